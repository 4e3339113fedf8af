"""The collectives of a compiled program, read from its HLO text: what moves, how often, along which mesh axes.

Bytes of a collective are those of the larger side, operands or result, on one device: of an all-gather the gathered
array, of a reduce-scatter the array before it is scattered, otherwise the operands. They follow from the operands, so
that a synchronous, an asynchronous and a fused form of one collective give the same number.

A program for several TPU slices is the program of one slice: its groups number the devices of that slice, and what goes
to other slices, over the data centre's network, is a pair of `send` and `recv` with attributes that tell what it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_BITS = {
    "pred": 8,
    "bf16": 16,
    "token": 0,
    "opaque": 0,
}  # the others carry their bits in the name: f32, u8, s4, c64


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # the rest of the line
    arguments: str  # the text between the parentheses: of a constant, its value
    root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One logical collective."""

    kind: str  # one of KINDS
    bytes: int  # of one execution on one device, see above
    shapes: tuple[str, ...]  # of the larger side: bf16[4096,512]
    groups: np.ndarray  # [groups, devices] int, places in the mesh; of a permute: [pairs, 2]
    count: int  # executions per run of the program
    asynchronous: bool
    dcn: bool = False  # between slices; `bytes` and `groups` are those of that part alone
    source: str = ""  # the JAX operation that it comes from, if the compiler kept its name

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.count


class Program(NamedTuple):
    """What `read` finds."""

    collectives: list[Collective]
    unknown_loops: list[
        str
    ]  # loops with collectives whose trip count the text does not tell: counted as one
    unreached: list[str]  # computations with collectives that nothing known here calls: not counted


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, name of the entry computation) of a module's text."""
    header = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
    line_form = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if line[:1] not in (" ", "}", ""):
            if found := header.match(line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif found := line_form.match(line):
            root, name, kind, opcode, rest = found.groups()
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            current[name] = Instruction(
                name, kind, opcode, operands, rest[end + 1 :], rest[:end], bool(root)
            )
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis that is open at the start of the text closes."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def shapes_of(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of each array in the text of a type, which may be a tuple."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", kind)
    return [(name, tuple(int(n.strip("<=")) for n in dims.split(",") if n)) for name, dims in found]


def size_of(shape: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of an array."""
    name, dims = shape
    bits = _BITS.get(name) if name in _BITS else int(re.match(r"[a-z]+(\d+)", name)[1])
    return math.prod(dims) * bits // 8


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """The groups of a collective as [groups, devices of a group], from any form in which XLA writes them.

    Lists `{{0,2},{1,3}}` (`{}`: all), iota `[2,4]<=[4,2]T(1,0)`, mesh axes `mesh['a'=2,'b'=4] {'a'}`, also with
    `device_ids=...` and with parts of axes `'b':(1)2`.
    """
    form = re.search(r"replica_groups=(.*)", attributes)
    if form is None:
        return np.arange(devices)[None]
    text = form[1]
    if found := re.match(r"\[([\d,]+)\]<=(\S+)", text):
        return _iota(found[2]).reshape(_numbers(found[1]))
    if found := re.match(r"@?mesh[\[<](.*?)[\]>](?:, device_ids=\((.*?)\))? ?\{(.*?)\}", text):
        return _mesh_groups(*found.groups())
    if found := re.match(r"\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
        return np.array(groups) if groups else np.arange(devices)[None]
    raise ValueError(f"replica groups of a form that is not known: {text[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(text: str) -> np.ndarray:
    """All numbers of `[4,2]T(1,0)`, flat: counted in that shape, then transposed."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    ids = np.arange(math.prod(_numbers(found[1]))).reshape(_numbers(found[1]))
    return (ids.transpose(_numbers(found[2])) if found[2] else ids).reshape(-1)


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> np.ndarray:
    sizes = {name: int(n) for name, n in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
    wanted = re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", over)
    # An axis of which a part is named is split in three: what lies before the part, the part, what lies behind it.
    names, shape = [], []
    for name, size in sizes.items():
        cuts = sorted(
            {
                1,
                size,
                *(int(x) for n, a, b in wanted if n == name and a for x in (a, int(a) * int(b))),
            }
        )
        for low, high in zip(cuts, cuts[1:]):
            names.append((name, low))
            shape.append(high // low)
        if size == 1:
            names.append((name, 1))
            shape.append(1)
    chosen = []
    for name, before, size in wanted:
        low, high = (int(before), int(before) * int(size)) if before else (1, sizes[name])
        chosen += [
            i
            for i, (n, start) in enumerate(names)
            if n == name and low <= start < max(high, low + 1)
        ]
    count = math.prod(shape)
    if device_ids is None:
        ids = np.arange(count)
    elif device_ids.startswith("["):
        ids = _iota(device_ids)
    elif device_ids.startswith("("):
        ids = _iota(device_ids.strip("()"))
    else:
        ids = np.array(_numbers(device_ids))
    rest = [i for i in range(len(shape)) if i not in chosen]
    return (
        ids.reshape(shape).transpose(rest + chosen).reshape(-1, math.prod(shape[i] for i in chosen))
    )


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ. `mesh`: sizes of its axes, in order."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, devices]
    return tuple(name for name, place in zip(mesh, places) if np.any(place != place[:, :1]))


class _Places:
    """Where in the mesh a device is that the text names by a number or by its id."""

    def __init__(self, devices: Sequence[Any]):
        slices = [getattr(device, "slice_index", None) or 0 for device in devices]
        self.of_slice = np.array(
            [[i for i, s in enumerate(slices) if s == which] for which in sorted(set(slices))]
        )
        self._of_id = {device.id: i for i, device in enumerate(devices)}

    def inside(self, attributes: str) -> np.ndarray:
        """[groups, devices] of a collective inside a slice."""
        if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
            groups = np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int).reshape(-1, 2)
        else:
            groups = replica_groups(attributes, self.of_slice.shape[1])
        return self.of_slice[0][groups]

    def across(self, target: str) -> np.ndarray:
        """[groups, devices] of a transfer between slices: `{1,2}x{0:7}`, or lists or pairs of the devices' ids."""
        if "x{" in target:
            return self.of_slice.T
        groups = [re.findall(r"\d+", group) for group in re.findall(r"\{([\d,\->]+)\}", target)]
        return np.array([[self._of_id[int(i)] for i in group] for group in groups])


def read(text: str, devices: Sequence[Any]) -> Program:
    """The collectives that one run of a compiled program executes on each device.

    A collective that the compiler cut into asynchronous pieces counts once; what a loop holds counts as often as the
    loop runs; of a conditional's branches the one with the most bytes counts.

    `devices`: of the mesh, in its order; of each `id` and, where there is one, `slice_index` are used.
    """
    computations, entry = parse(text)
    unknown: list[str] = []
    reached: set[str] = set()
    found = _visit(computations, entry, 1, None, unknown, reached, _Places(devices))
    holders = [
        name for name, lines in computations.items() if any(map(_is_collective, lines.values()))
    ]
    pieces: dict[str, Collective] = {}
    result = []
    for collective, chain in found:
        if chain is None:
            result.append(collective)
        else:
            pieces.setdefault(
                chain, collective
            )  # the first piece starts it; later ones may lie in an inner loop
    return Program(
        result + list(pieces.values()), unknown, [name for name in holders if name not in reached]
    )


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _visit(
    computations, name, count, caller, unknown, reached, places
) -> list[tuple[Collective, str | None]]:
    """[(collective, chain)] of a computation and those that it calls. `chain`: the same for all pieces of one."""
    result = []
    reached.add(name)
    for instruction in computations.get(name, {}).values():
        opcode, attributes = instruction.opcode, instruction.attributes

        def called(key):
            return re.findall(rf"\b{key}=%?([\w.\-]+)", attributes)

        def visit(child, times=count):
            return _visit(computations, child, times, instruction, unknown, reached, places)

        if _is_collective(instruction):
            result.append(_collective(computations[name], name, instruction, count, caller, places))
        elif opcode == "send" and "_xla_megascale_transfer_type" in attributes:
            result.append((_transfer(computations[name], instruction, count, places), None))
        elif opcode == "while":
            body = called("body")[0]
            trips = trip_count(computations, computations[name], instruction)
            inner = visit(body, count * (1 if trips is None else trips))
            if trips is None and any(chain is None for _, chain in inner):
                unknown.append(body)
            result += inner
        elif opcode == "conditional":
            listed = re.search(r"branch_computations=\{(.*?)\}", attributes)
            branches = (
                re.findall(r"%?([\w.\-]+)", listed[1])
                if listed
                else called("(?:true|false)_computation")
            )
            result += max(
                map(visit, branches),
                key=lambda found: sum(c.total_bytes for c, _ in found),
                default=[],
            )
        elif opcode.removesuffix("-start") in ("fusion", "call", "custom-call", "async"):
            # With `-start`: a computation that runs beside this one, for instance on a TPU's sparse cores.
            listed = re.search(r"called_computations=\{(.*?)\}", attributes)
            several = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
            for child in called("(?:calls|to_apply)") + several:
                result += visit(child)
    return result


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _collective(computation, computation_name, instruction, count, caller, places):
    kind, attributes = instruction.opcode.removesuffix("-start"), instruction.attributes
    shapes = [
        shape for operand in instruction.operands for shape in shapes_of(computation[operand].type)
    ]
    groups = places.inside(attributes)
    if kind == "all-gather":
        along = int(_first(r"\bdimensions=\{(\d+)\}", attributes))

        def longer(dims):
            return dims[:along] + (dims[along] * groups.shape[1],) + dims[along + 1 :]

        shapes = [(element, longer(dims)) for element, dims in shapes]
    around = f"{computation_name} {caller.name if caller else ''}"
    # XLA:TPU writes some reduce-scatters as a fused kernel whose body shows an all-reduce.
    if kind == "all-reduce" and "all-reduce-scatter" in around:
        kind = "reduce-scatter"
    # Channels do not tell collectives apart: most of those inside a `shard_map` have number 1.
    chain = _first(r'chain_id="(\w+)"', attributes) or None
    if chain is None and re.search(r"async[_-]collective", around):
        # Without a number of the chain its pieces have channel, groups and types in common.
        chain = str((_first(r"channel_id=(\d+)", attributes), kind, shapes, groups.tolist()))
    started = instruction.opcode.endswith("-start") or (
        caller is not None and caller.opcode.endswith("-start")
    )
    source = _first(r'op_name="([^"]*)"', attributes)
    return _make(kind, shapes, groups, count, started or chain is not None, False, source), chain


def _transfer(computation, send, count, places) -> Collective:
    """The part of a collective that goes to other slices, from its `send` and the `recv` of the same rendezvous."""

    def rendezvous(instruction):
        return _first(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)

    both = [
        i
        for i in computation.values()
        if i.opcode in ("send", "recv") and rendezvous(i) == rendezvous(send)
    ]
    larger = max((shapes_of(i.type)[0] for i in both), key=size_of)
    kind = (
        _first(r'_xla_megascale_transfer_type="(\w+)"', send.attributes).lower().replace("_", "-")
    )
    kind = kind if kind in KINDS else "collective-permute"  # ONE_TO_ONE
    groups = places.across(_first(r'_xla_megascale_target="?(\{.*?\})"?,_xla', send.attributes))
    return _make(kind, [larger], groups, count, True, True, rendezvous(send))


def _make(kind, shapes, groups, count, asynchronous, dcn, source) -> Collective:
    text = tuple(f"{element}[{','.join(map(str, dims))}]" for element, dims in shapes)
    return Collective(
        kind, sum(map(size_of, shapes)), text, groups, count, asynchronous, dcn, source
    )


def trip_count(computations, computation, loop: Instruction) -> int | None:
    """How often a while loop runs, if the text tells: from the backend config, or from a counter that begins at a
    constant, grows by a constant and is compared with one."""
    if found := re.search(r'known_trip_count[^}]*?"?n"?:\s*"?(\d+)', loop.attributes):
        return int(found[1])
    condition = computations[re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)[1]]
    body = computations[re.search(r"\bbody=%?([\w.\-]+)", loop.attributes)[1]]
    test = next((i for i in condition.values() if i.root), None)
    direction = re.search(r"direction=(\w+)", test.attributes) if test else None
    if direction is None or len(test.operands) != 2:
        return None
    left, right = (_constant(condition, operand) for operand in test.operands)
    if (left is None) == (right is None):
        return None
    swap = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    way = direction[1] if right is not None else swap.get(direction[1], direction[1])
    limit = right if right is not None else left
    index = _tuple_index(condition, test.operands[0 if right is not None else 1])
    if index is None or way not in ("LT", "LE", "NE"):
        return None
    start, step = _initial(computation, loop, index), _increment(body, index)
    if step <= 0:
        return None
    return max(0, -(-(limit + (way == "LE") - start) // step))


def _constant(computation, name: str) -> int | None:
    instruction = computation.get(name)
    while instruction and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if (
        instruction
        and instruction.opcode == "constant"
        and re.fullmatch(r"-?\d+", instruction.arguments.strip())
    ):
        return int(instruction.arguments)
    return None


def _tuple_index(computation, name: str) -> int | None:
    instruction = computation.get(name)
    while instruction and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    found = re.search(r"index=(\d+)", instruction.attributes) if instruction else None
    return int(found[1]) if found and instruction.opcode == "get-tuple-element" else None


def _initial(computation, loop: Instruction, index: int) -> int:
    """Where the counter begins; 0, as that of every `scan` does, if the text does not show it."""
    operand = computation.get(loop.operands[0])
    value = (
        _constant(computation, operand.operands[index])
        if operand and operand.opcode == "tuple"
        else None
    )
    return value if value is not None else 0


def _increment(body, index: int) -> int:
    """By how much the counter grows; 1, as that of every `scan` does, if the text does not show it."""
    root = next((i for i in body.values() if i.root), None)
    total = body.get(root.operands[index]) if root and root.opcode == "tuple" else None
    while total and total.opcode in ("copy", "bitcast"):
        total = body.get(total.operands[0])
    if total and total.opcode == "add":
        values = [_constant(body, operand) for operand in total.operands]
        return next((value for value in values if value is not None), 1)
    return 1
