"""Finds the collectives of a compiled program: their bytes, counts and mesh axes.

The bytes of a collective are those of its larger side, operands or result, on one device: the
gathered array of an all-gather, the array before the scatter of a reduce-scatter, and the operands
of all others. They are computed from the operands, so the synchronous, asynchronous and fused forms
of a collective give the same number.

A program for several TPU slices is the program of one slice, and its groups number the devices of
that slice. Traffic to other slices over the data centre network (DCN) is a pair of `send` and
`recv` instructions, whose attributes describe the collective.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.pod.hlo import (
    Array,
    Computation,
    Instruction,
    first_group,
    parse,
    shapes_of,
    size_of,
    trip_count,
)

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One logical collective.

    Attributes:
      kind: one of KINDS.
      bytes: bytes of one execution on one device.
      shapes: arrays of the larger side, such as bf16[4096,512].
      groups: [groups, devices] int, positions in the mesh; [pairs, 2] for a permute.
      count: executions per run of the program.
      asynchronous: whether other operations can run at the same time.
      dcn: whether it is the part between slices; `bytes` and `groups` describe only that part.
      source: the JAX operation that it comes from, if the compiler kept its name.
    """

    kind: str
    bytes: int
    shapes: tuple[str, ...]
    groups: np.ndarray
    count: int
    asynchronous: bool
    dcn: bool = False
    source: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of all executions."""
        return self.bytes * self.count


class Program(NamedTuple):
    """The result of `read`.

    Attributes:
      collectives: all collectives of the program.
      unknown_loops: bodies of loops with collectives whose trip count is unknown; they count once.
      unreached: computations with collectives but without a known caller; they are not counted.
    """

    collectives: list[Collective]
    unknown_loops: list[str]
    unreached: list[str]


def read(text: str, devices: Sequence[Any]) -> Program:
    """Finds the collectives that one run of a compiled program executes on each device.

    A collective that the compiler cut into asynchronous pieces counts once. A collective in a loop
    counts once per iteration. Of a conditional, only the branch with the most bytes counts.

    Args:
      text: HLO text of the compiled program.
      devices: the devices of the mesh, in mesh order, with `id` and optionally `slice_index`.
    """
    reader = _Reader(text, devices)
    result: list[Collective] = []
    chains: dict[str, Collective] = {}
    for collective, chain in reader.visit(reader.module.entry, 1, None):
        if chain is None:
            result.append(collective)
        else:
            # The first piece starts the collective. Later pieces may be in an inner loop.
            chains.setdefault(chain, collective)
    unreached = []
    for name, computation in reader.module.computations.items():
        if name not in reader.reached and any(map(_is_collective, computation.values())):
            unreached.append(name)
    return Program([*result, *chains.values()], reader.unknown_loops, unreached)


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ.

    Args:
      groups: [groups, devices] int, positions in the mesh.
      mesh: {axis: size}, in mesh order.
    """
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, devices]
    return tuple(
        name for name, place in zip(mesh, places, strict=True) if np.any(place != place[:, :1])
    )


# Traversal of a program

# A collective, and a name that all its pieces share, or None if it is not in pieces.
_Found = tuple[Collective, str | None]


class _Reader:
    """Visits the computations of a program in call order."""

    def __init__(self, text: str, devices: Sequence[Any]) -> None:
        self.module = parse(text)
        self.unknown_loops: list[str] = []
        self.reached: set[str] = set()
        self._positions = _Positions(devices)

    def visit(self, name: str, count: int, caller: Instruction | None) -> list[_Found]:
        """Returns the collectives of a computation and of all computations that it calls.

        Args:
          name: name of the computation.
          count: how often the computation runs.
          caller: the instruction that calls it, or None for the entry.
        """
        self.reached.add(name)
        computation = self.module.computations.get(name, {})
        found: list[_Found] = []
        for instruction in computation.values():
            if _is_collective(instruction):
                found.append(self._collective(computation, name, instruction, count, caller))
            elif instruction.opcode == "while":
                found += self._loop(computation, instruction, count)
            elif instruction.opcode == "conditional":
                found += self._largest_branch(instruction, count)
            elif instruction.opcode == "send":
                if "_xla_megascale_transfer_type" in instruction.attributes:
                    found.append((self._transfer(computation, instruction, count), None))
            else:
                for callee in _called(instruction):
                    found += self.visit(callee, count, instruction)
        return found

    def _loop(self, computation: Computation, loop: Instruction, count: int) -> list[_Found]:
        body = loop.attribute("body")[0]
        trips = trip_count(self.module, computation, loop)
        found = self.visit(body, count * (1 if trips is None else trips), loop)
        if trips is None and any(chain is None for _, chain in found):
            self.unknown_loops.append(body)
        return found

    def _largest_branch(self, conditional: Instruction, count: int) -> list[_Found]:
        names = conditional.names_in("branch_computations")
        names = names or conditional.attribute("(?:true|false)_computation")
        branches = [self.visit(name, count, conditional) for name in names]
        return max(branches, key=_total_bytes, default=[])

    def _collective(
        self,
        computation: Computation,
        name: str,
        instruction: Instruction,
        count: int,
        caller: Instruction | None,
    ) -> _Found:
        kind, attributes = instruction.opcode.removesuffix("-start"), instruction.attributes
        arrays: list[Array] = []
        for operand in instruction.operands:
            arrays += shapes_of(computation[operand].type)
        groups = self._positions.inside(attributes)
        if kind == "all-gather":
            axis = int(first_group(r"\bdimensions=\{(\d+)\}", attributes))
            arrays = [_gathered(array, axis, groups.shape[1]) for array in arrays]
        context = f"{name} {caller.name if caller else ''}"
        # XLA:TPU writes some reduce-scatters as a fused kernel whose body has an all-reduce.
        if kind == "all-reduce" and "all-reduce-scatter" in context:
            kind = "reduce-scatter"
        chain = first_group(r'chain_id="(\w+)"', attributes) or None
        if chain is None and re.search(r"async[_-]collective", context):
            # Pieces without a chain id share channel, groups and types. The channel alone does not
            # identify a collective: inside a `shard_map`, most have channel 1.
            channel = first_group(r"channel_id=(\d+)", attributes)
            chain = str((channel, kind, arrays, groups.tolist()))
        asynchronous = (
            chain is not None
            or instruction.opcode.endswith("-start")
            or (caller is not None and caller.opcode.endswith("-start"))
        )
        collective = Collective(
            kind=kind,
            bytes=sum(map(size_of, arrays)),
            shapes=tuple(map(_shape_text, arrays)),
            groups=groups,
            count=count,
            asynchronous=asynchronous,
            source=first_group(r'op_name="([^"]*)"', attributes),
        )
        return collective, chain

    def _transfer(self, computation: Computation, send: Instruction, count: int) -> Collective:
        """Returns the part of a collective between slices.

        Its `send` and the `recv` with the same rendezvous describe it.
        """
        rendezvous = _rendezvous(send)
        arrays = [
            shapes_of(one.type)[0]
            for one in computation.values()
            if one.opcode in ("send", "recv") and _rendezvous(one) == rendezvous
        ]
        larger = max(arrays, key=size_of)
        kind = first_group(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
        kind = kind.lower().replace("_", "-")
        target = first_group(r'_xla_megascale_target="?(\{.*?\})"?,_xla', send.attributes)
        return Collective(
            kind=kind if kind in KINDS else "collective-permute",  # the type is ONE_TO_ONE
            bytes=size_of(larger),
            shapes=(_shape_text(larger),),
            groups=self._positions.across(target),
            count=count,
            asynchronous=True,
            dcn=True,
            source=rendezvous,
        )


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _called(instruction: Instruction) -> list[str]:
    """Returns the computations that an instruction runs once.

    After a `-start` instruction they run concurrently, e.g. on the sparse cores of a TPU.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in ("fusion", "call", "custom-call", "async"):
        return []
    called = instruction.attribute("(?:calls|to_apply)")
    return called + instruction.names_in("called_computations")


def _total_bytes(found: list[_Found]) -> int:
    return sum(collective.total_bytes for collective, _ in found)


def _gathered(array: Array, axis: int, devices: int) -> Array:
    """Returns the result of an all-gather of an array over `devices` devices."""
    element, dims = array
    return element, (*dims[:axis], dims[axis] * devices, *dims[axis + 1 :])


def _shape_text(array: Array) -> str:
    element, dims = array
    return f"{element}[{','.join(map(str, dims))}]"


def _rendezvous(instruction: Instruction) -> str:
    return first_group(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)


# Groups of devices


class _Positions:
    """Maps devices, which the text names by number or by id, to positions in the mesh."""

    def __init__(self, devices: Sequence[Any]) -> None:
        slices = np.array([getattr(device, "slice_index", None) or 0 for device in devices])
        # [slices, devices of a slice]
        self._of_slice = np.stack([np.flatnonzero(slices == which) for which in np.unique(slices)])
        self._of_id = {device.id: position for position, device in enumerate(devices)}

    def inside(self, attributes: str) -> np.ndarray:
        """Returns the groups [groups, devices] of a collective inside a slice."""
        if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
            groups = np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int).reshape(-1, 2)
        else:
            groups = replica_groups(attributes, self._of_slice.shape[1])
        return self._of_slice[0][groups]

    def across(self, target: str) -> np.ndarray:
        """Returns the groups [groups, devices] of a transfer between slices.

        Args:
          target: `{1,2}x{0:7}`, or lists or pairs of device ids.
        """
        if "x{" in target:
            return self._of_slice.T
        groups = [re.findall(r"\d+", group) for group in re.findall(r"\{([\d,\->]+)\}", target)]
        return np.array([[self._of_id[int(i)] for i in group] for group in groups])


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Parses the groups of a collective into [groups, devices of a group] int.

    Reads every form that XLA writes:

    - lists: `{{0,2},{1,3}}`, where `{}` means all devices in one group;
    - iota: `[2,4]<=[4,2]T(1,0)`;
    - mesh axes: `mesh['a'=2,'b'=4] {'a'}`, optionally with `device_ids=...` and with parts of axes
      such as `'b':(1)2`.

    Args:
      attributes: attributes of the instruction.
      devices: number of devices of the program.

    Raises:
      ValueError: the form is not known.
    """
    everything = np.arange(devices)[None]
    text = first_group(r"replica_groups=(.*)", attributes)
    if not text:
        return everything
    if match := re.match(r"\[([\d,]+)\]<=(\S+)", text):
        return _iota(match[2]).reshape(_numbers(match[1]))
    if match := re.match(r"@?mesh[\[<](.*?)[\]>](?:, device_ids=\((.*?)\))? ?\{(.*?)\}", text):
        return _mesh_groups(*match.groups())
    if match := re.match(r"\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
        return np.array(groups) if groups else everything
    raise ValueError(f"the form of these replica groups is not known: {text[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(text: str) -> np.ndarray:
    """Returns the ids of `[4,2]T(1,0)`: an iota of that shape, transposed and flattened."""
    shape = _numbers(first_group(r"^\[([\d,]+)\]", text))
    order = _numbers(first_group(r"\]T\(([\d,]+)\)", text))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(order) if order else ids).reshape(-1)


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> np.ndarray:
    """Returns the groups along some axes of a mesh as [groups, devices of a group] int.

    Args:
      axes: names and sizes of all axes, such as `'a'=2,'b'=4`.
      device_ids: ids of the devices in mesh order, as iota or as a list. None means 0, 1, 2, ...
      over: the axes within a group, such as `'a'`, or parts of axes. The part `'b':(1)2` is the
        factor 2 of the axis b that follows a factor 1.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
    parts = []  # of each (part of an) axis within a group: name, product before it, product with it
    for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", over):
        low = int(before) if before else 1
        parts.append((name, low, low * int(size) if before else sizes[name]))
    # Split an axis that is used in part into factors: before the part, the part, and after it.
    factors, shape = [], []
    for name, size in sizes.items():
        cuts = {1, size}
        for axis, low, high in parts:
            cuts |= {low, high} if axis == name else set()
        for low, high in itertools.pairwise(sorted(cuts)):
            factors.append((name, low))
            shape.append(high // low)
    chosen = []
    for name, low, high in parts:
        chosen += [i for i, (axis, cut) in enumerate(factors) if axis == name and low <= cut < high]
    rest = [i for i in range(len(shape)) if i not in chosen]
    ids = np.arange(math.prod(shape)) if device_ids is None else _device_ids(device_ids)
    group = math.prod(shape[i] for i in chosen)
    return ids.reshape(shape).transpose(rest + chosen).reshape(-1, group)


def _device_ids(text: str) -> np.ndarray:
    if text.startswith("["):
        return _iota(text)
    if text.startswith("("):
        return _iota(text.strip("()"))
    return np.array(_numbers(text))
