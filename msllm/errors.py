"""The exceptions whose messages are for the user, not for a developer."""


class UserError(ValueError):
    """Bad input. The message names the value, the rule that it breaks and the remedy."""


class RunError(RuntimeError):
    """A run that cannot go on although its input is good.

    The message says what happened and how to continue.
    """
