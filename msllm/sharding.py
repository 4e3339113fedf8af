"""The device mesh, the one table from logical axes to mesh axes, and the collectives between them.

Code names axes by what they are (`batch`, `stream`, `heads`, ...); only this file knows where they live. The loss runs
inside one `shard_map`, where every array is this device's part: which collectives a step needs is written in the code,
not left to a compiler's guess. The optimizer and everything else outside is plain `jit` with shardings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from msllm.config import Config, MeshConfig
from msllm.errors import UserError
from msllm.streams import StreamSpec

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))  # data, fsdp, stream, tensor

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "row": (),
    "stream": ("stream",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "embed": ("fsdp", "stream"),  # d_model of parameters: gathered when used
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "replicated": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh `data x fsdp x stream x tensor` over all devices. Raises UserError when their numbers do not match."""
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = list(dataclasses.astuple(config))
    known = int(np.prod([n for n in sizes if n != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        asked = ", ".join(f"{name}={n}" for name, n in zip(AXES, dataclasses.astuple(config)))
        raise UserError(
            f"config.mesh ({asked}) does not fit {len(devices)} devices: the product of the axes must equal the number "
            "of devices; set one axis to -1 to let it take what remains"
        )
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(config: Config, streams: StreamSpec, mesh: Mesh) -> None:
    """Raises UserError when an axis of the mesh does not divide what lies along it."""
    model = config.model
    lengths = {
        "batch": (config.data.batch_size // config.optim.accumulate, "data.batch_size / optim.accumulate"),
        "stream": (streams.size, "the number of streams"),
        "heads": (model.num_heads, "model.num_heads"),
        "kv_heads": (model.num_kv_heads, "model.num_kv_heads"),
        "mlp": (model.d_ff, "model.d_ff"),
        "embed": (model.d_model, "model.d_model"),
        "vocab": (model.vocab_size, "model.vocab_size"),
    }
    for axis, (length, name) in lengths.items():
        parts = int(np.prod([mesh.shape[a] for a in RULES[axis]]))
        if length % parts:
            sizes = " x ".join(f"{a}={mesh.shape[a]}" for a in RULES[axis])
            raise UserError(
                f"the mesh does not divide {name}: {length} over {sizes}; choose mesh axes whose product divides "
                f"{length}, or change {name}"
            )


def partition(*axes: str) -> PartitionSpec:
    """PartitionSpec of logical axes. A mesh axis that two of them claim raises ValueError."""
    used = [mesh_axis for axis in axes for mesh_axis in RULES[axis]]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
    return PartitionSpec(*(RULES[axis] or None for axis in axes))


def named(mesh: Mesh, *axes: str) -> NamedSharding:
    """NamedSharding of logical axes on `mesh`."""
    return NamedSharding(mesh, partition(*axes))


def axis_size(axis: str) -> int:
    """Devices along a mesh axis, seen from inside `shard_map`; 1 outside of it, so model code runs in both."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_index(axis: str):
    """This device's place along a mesh axis inside `shard_map`; 0 outside of it."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def gather(x: jax.Array, axis: int, mesh_axes: Sequence[str]) -> jax.Array:
    """The whole of an array whose dimension `axis` is sharded over `mesh_axes`, gathered one mesh axis after the other.

    The innermost goes first. Backward, each becomes a reduce-scatter along one axis of the mesh, which is one physical
    axis of a TPU torus: over several axes at once, XLA falls back to all-reducing whole arrays.
    """
    for mesh_axis in reversed(mesh_axes):
        if axis_size(mesh_axis) > 1:
            x = jax.lax.all_gather(x, mesh_axis, axis=axis, tiled=True)
    return x


def total(x, *mesh_axes: str):
    """Sum over mesh axes inside `shard_map`; x outside of it."""
    axes = tuple(axis for axis in mesh_axes if axis_size(axis) > 1)
    return jax.lax.psum(x, axes) if axes else x


BATCH_AXES = {"tokens": ("batch", "row", "stream"), "present": ("batch", "row", "stream"), "segment": ("batch", "row")}


def batch_shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    """Shardings of a batch of tables, by array name."""
    return {name: named(mesh, *axes) for name, axes in BATCH_AXES.items()}
