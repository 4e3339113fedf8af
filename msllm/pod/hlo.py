"""Parses the HLO text of a compiled program: instructions, array sizes and loop trip counts."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
# Bits of an element. The names of all other types contain their bits: f32, u8, s4, c64.
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
_MOVES = ("copy", "bitcast", "convert")  # these do not change the value of a loop counter

Array = tuple[str, tuple[int, ...]]  # element type and dimensions


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: its name.
      type: the text of its result type, such as bf16[4,8].
      opcode: the operation, such as all-gather.
      operands: names of the instructions whose results it takes.
      attributes: the text after the parentheses.
      arguments: the text between the parentheses; for a constant, its value.
      root: whether its result is that of the computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str
    root: bool

    def attribute(self, name: str) -> list[str]:
        """Returns the names in attributes `name=value`, such as called computations."""
        return re.findall(rf"\b{name}=%?([\w.\-]+)", self.attributes)

    def names_in(self, name: str) -> list[str]:
        """Returns the names in an attribute `name={a, b, ...}`."""
        listed = first_group(rf"{name}=\{{(.*?)\}}", self.attributes)
        return re.findall(r"%?([\w.\-]+)", listed)


Computation = dict[str, Instruction]  # by name, in program order


class Module(NamedTuple):
    """A program: its computations by name, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of a module."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line[:1] not in (" ", "}", ""):
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, kind, opcode, rest = match.groups()
            end = _closing(rest)
            arguments, attributes = rest[:end], rest[end + 1 :]
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            current[name] = Instruction(
                name, kind, opcode, operands, attributes, arguments, bool(root)
            )
    return Module(computations, entry)


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes the one opened just before the text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def first_group(pattern: str, text: str) -> str:
    """Returns what the first group of a pattern matches in the text, or "" without a match."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def shapes_of(kind: str) -> list[Array]:
    """Returns the arrays in the text of a type, which may be a tuple."""
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", kind)
    return [
        (name, tuple(int(n.strip("<=")) for n in dims.split(",") if n)) for name, dims in arrays
    ]


def size_of(array: Array) -> int:
    """Returns the size of an array in bytes."""
    name, dims = array
    bits = _BITS[name] if name in _BITS else int(first_group(r"^[a-z]+(\d+)", name))
    return math.prod(dims) * bits // 8


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a while loop runs, or None if the text does not say.

    Reads the number from the backend config, or derives it from a counter that starts at a
    constant, grows by a constant and is compared with a constant.
    """
    if known := first_group(r'known_trip_count[^}]*?"?n"?:\s*"?(\d+)', loop.attributes):
        return int(known)
    condition = module.computations[loop.attribute("condition")[0]]
    body = module.computations[loop.attribute("body")[0]]
    found = _comparison(condition)
    if found is None:
        return None
    counter, direction, limit = found
    index = _tuple_index(condition, counter)
    if index is None or direction not in ("LT", "LE", "NE"):
        return None
    start, step = _start(computation, loop, index), _step(body, index)
    if step <= 0:
        return None
    if direction == "LE":
        limit += 1
    return max(0, -(-(limit - start) // step))  # rounded up


def _comparison(condition: Computation) -> tuple[str, str, int] | None:
    """Returns (counter, direction, limit) if the condition compares a counter with a constant."""
    test = _root(condition)
    if test is None or len(test.operands) != 2:
        return None
    direction = first_group(r"direction=(\w+)", test.attributes)
    left, right = test.operands
    left_value, right_value = _constant(condition, left), _constant(condition, right)
    if left_value is None and right_value is not None:
        return left, direction, right_value
    if left_value is not None and right_value is None:
        return right, _MIRRORED.get(direction, direction), left_value
    return None


def _root(computation: Computation) -> Instruction | None:
    return next((one for one in computation.values() if one.root), None)


def _source(
    computation: Computation, name: str, through: tuple[str, ...] = _MOVES
) -> Instruction | None:
    """Follows copies and conversions from `name` to the instruction that produced its value."""
    instruction = computation.get(name)
    while instruction and instruction.opcode in through:
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    source = _source(computation, name)
    if source is None or source.opcode != "constant":
        return None
    return int(source.arguments) if re.fullmatch(r"\s*-?\d+\s*", source.arguments) else None


def _tuple_index(computation: Computation, name: str) -> int | None:
    """Returns the index of a value in the loop's tuple, or None if it is not an element."""
    source = _source(computation, name)
    if source is None or source.opcode != "get-tuple-element":
        return None
    index = first_group(r"index=(\d+)", source.attributes)
    return int(index) if index else None


def _start(computation: Computation, loop: Instruction, index: int) -> int:
    """Returns the start of the counter. Without a constant in the text it is 0, as in `scan`."""
    operand = computation.get(loop.operands[0])
    value = None
    if operand and operand.opcode == "tuple":
        value = _constant(computation, operand.operands[index])
    return 0 if value is None else value


def _step(body: Computation, index: int) -> int:
    """Returns the step of the counter. Without a constant in the text it is 1, as in `scan`."""
    root = _root(body)
    if root is None or root.opcode != "tuple":
        return 1
    total = _source(body, root.operands[index], ("copy", "bitcast"))
    if total is None or total.opcode != "add":
        return 1
    values = [_constant(body, operand) for operand in total.operands]
    return next((value for value in values if value is not None), 1)
