"""Writes the config of a plan as a commented file."""

from __future__ import annotations

import json
import shlex
import textwrap
from typing import Any

from msllm.starter.plan import Plan
from msllm.starter.survey import Survey

_WIDTH = 100
_INDENT = "    "


def render(name: str, command: str, commands: list[str], found: Survey, plan: Plan) -> str:
    """Returns the text of a config file.

    Args:
      name: the name of the run.
      command: the command line that writes the file.
      commands: the command lines to go on with.
      found, plan: what the file is written from.
    """
    config, reasons = plan.config, plan.reasons
    data, model = config.data, config.model
    lines = _Lines()
    shown = "\n".join(f"{_INDENT}{line}" for line in commands[:3])
    head = f'"""{name}: {found.kind}. Written by `{command}`.\n\n{shown}\n\n'
    head += f"Run the commands in the folder where the file was written.\n{summary(found, plan)}"
    lines.text.append(head.replace("\\", "\\\\").replace('"""', "'''").replace("'''", '"""', 1))
    lines.text.append('"""\n\nfrom msllm.config import default_config\n\n')
    lines.text.append(
        "\ndef get_config():\n" + f'{_INDENT}"""Returns all settings of the run."""\n'
    )
    lines.text.append(f"{_INDENT}config = default_config()\n")

    lines.set("steps", config.steps, reasons["steps"])
    lines.set("log_every", config.log_every)
    lines.set("eval_every", config.eval_every)
    lines.set("checkpoint.every", config.checkpoint.every)

    lines.comment("Streams. The model writes those of the kinds output and thought.")
    lines.set("streams.names", config.streams.names)
    lines.set("streams.kinds", config.streams.kinds)
    if config.streams.skip_silence:
        lines.set(
            "streams.skip_silence",
            True,
            "a question after a long silence looks like one after a short silence",
        )

    lines.comment("Data (docs/data.md).")
    lines.set("data.dir", data.dir)
    lines.set("data.path", data.path)
    if data.format:
        lines.set("data.format", data.format)
    for note in found.notes:
        lines.note(note)
    lines.set("data.converter", data.converter)
    if data.options:
        lines.set("data.options", dict(data.options))
    lines.note(f"The tokenizer is {reasons['data.tokenizer']}.")
    lines.set("data.rows", data.rows, reasons["data.rows"])
    lines.set("data.batch_size", data.batch_size, reasons["data.batch_size"])
    lines.set("data.eval_percent", data.eval_percent, reasons["data.eval_percent"])
    if data.split != "hash":
        lines.set("data.split", data.split, "hold out the end of the text")
    lines.set("data.shards", data.shards)

    lines.comment(f"A model of {int(plan.facts['parameters']):,} parameters: {reasons['model']}.")
    names = ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff")
    for field in (*names, "rope_theta", "compute_dtype"):
        lines.set(f"model.{field}", getattr(model, field))
    lines.comment("Larger models need smaller learning rates.")
    lines.set("optim.lr", config.optim.lr)
    lines.set("optim.warmup_steps", config.optim.warmup_steps)
    lines.text.append(f"{_INDENT}return config\n")
    return "".join(lines.text)


def summary(found: Survey, plan: Plan) -> str:
    """Returns what was found and chosen, as lines."""
    facts, about = plan.facts, "" if found.share == 1.0 else "about "
    lines = [
        f"Data: {found.kind}; {about}{int(facts['examples']):,} examples,"
        f" {about}{int(facts['tokens']):,} tokens.",
        f"Cost: {int(facts['parameters']):,} parameters, {plan.config.steps:,} steps of about"
        f" {facts['step_seconds']:.2g} {_unit(plan)}, {plan.minutes:.1f} {_unit(plan, 'minutes')}.",
    ]
    return "".join(f"{line}\n" for line in lines)


def _unit(plan: Plan, what: str = "seconds") -> str:
    return f"CPU-{what}" if plan.config.model.compute_dtype == "float32" else what


def next_commands(config_file: str, name: str, found: Survey, plan: Plan) -> list[str]:
    """Returns the command lines to go on with."""
    config, run = shlex.quote(config_file), shlex.quote(f"runs/{name}")
    inputs = "".join(
        f" --input={shlex.quote(f'{stream}={_short(text)}')}"
        for stream, text in found.prompt.items()
    )
    return [
        f"msllm prepare --config={config}",
        f"msllm inspect {shlex.quote(plan.config.data.dir)}",
        f"msllm train --config={config} --workdir={run}",
        f"msllm generate --checkpoint={run}{inputs} --rows={plan.rows}",
        f"msllm chat --checkpoint={run}",
    ]


def _literal(value: Any, indent: str = "") -> str:
    """Returns a value as Python source; with an indent, each of its items on a line of its own."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8
            return repr(value)
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        items = [f"{_literal(key)}: {_literal(item)}" for key, item in value.items()]
        opening, closing = "{}"
    elif isinstance(value, (list, tuple)):
        items = [_literal(item) for item in value]
        opening, closing = "()" if isinstance(value, tuple) else "[]"
    else:
        return repr(value)
    if indent and items:
        inner = "".join(f"{indent}{_INDENT}{item},\n" for item in items)
        return f"{opening}\n{inner}{indent}{closing}"
    comma = "," if isinstance(value, tuple) and len(items) == 1 else ""
    return f"{opening}{', '.join(items)}{comma}{closing}"


def _short(text: str) -> str:
    """Returns the first line of a text, cut to a length that a command line can hold."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 200 else line[:200].rpartition(" ")[0] or line[:200]


class _Lines:
    """The lines of the function of a config file."""

    def __init__(self) -> None:
        self.text: list[str] = []

    def comment(self, text: str) -> None:
        """Adds a comment that begins a block."""
        self.text.append("\n")
        self._wrap(text)

    def note(self, text: str) -> None:
        """Adds a sentence as a comment."""
        self._wrap(f"{text[:1].upper()}{text[1:].rstrip('.')}.")

    def set(self, setting: str, value: Any, why: str = "") -> None:
        """Adds the line that sets a setting, with the reason for its value."""
        line = f"{_INDENT}config.{setting} = {_literal(value)}"
        if len(line) > _WIDTH and isinstance(value, (dict, list, tuple)):
            line = f"{_INDENT}config.{setting} = {_literal(value, _INDENT)}"
        if why and len(line) + len(why) + 4 <= _WIDTH and "\n" not in line:
            line += f"  # {why}"
        elif why:
            self.note(why)
        self.text.append(f"{line}\n")

    def _wrap(self, text: str) -> None:
        start = f"{_INDENT}# "
        text = " ".join(text.split())
        self.text += [
            f"{line}\n"
            for line in textwrap.wrap(
                text, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
            )
        ]
