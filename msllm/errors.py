"""The exceptions whose messages are for the user, not for a developer."""


class UserError(ValueError):
    """Invalid input. The message names the value, the rule that it breaks and the remedy."""


class RunError(RuntimeError):
    """A run cannot continue although its input is valid.

    The message says what happened and how to continue.
    """
