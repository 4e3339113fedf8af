"""The device mesh, the table from logical axes to mesh axes, and collectives over mesh axes.

Other modules use logical axes (`batch`, `stream`, `heads`, ...). Only this file maps them to axes
of the mesh. The loss runs inside one `shard_map`, where every array is the shard of one device. The
code therefore states the collectives that a step needs, and the compiler does not infer them. The
optimizer and everything else runs under plain `jit` with shardings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from msllm.config import Config, MeshConfig
from msllm.errors import UserError

# The config's axis `fsdp` becomes two axes of the mesh. `fsdp_inner` is the part that shares a
# physical axis of a TPU torus with `stream` and `tensor`. Parameters are gathered, and their
# gradients scattered, in stages of one physical axis each. Over a group of devices that spans
# several physical axes, XLA falls back to all-reducing whole gradients.
AXES = ("data", "fsdp", "fsdp_inner", "stream", "tensor")
FSDP = ("fsdp", "fsdp_inner")

Stage = str | tuple[str, ...]  # mesh axes over which one collective gathers an array

# The mesh axes of each logical axis, in stages.
RULES: dict[str, tuple[Stage, ...]] = {
    "batch": ("data", *FSDP),
    "row": (),
    "panel": (),
    "stream": ("stream",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "embed": ("fsdp", ("fsdp_inner", "stream")),  # d_model of parameters: gathered when used
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "replicated": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh `data x fsdp x stream x tensor`, aligned with the axes of the network.

    TPU slices lie along `data`, whose size must be a multiple of the number of slices.

    Args:
      config: the sizes of the axes.
      devices: the devices to use; None: all devices.

    Raises UserError if the sizes do not fit the devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = list(dataclasses.astuple(config))
    known = int(np.prod([n for n in sizes if n != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        asked = ", ".join(f"{name}={n}" for name, n in dataclasses.asdict(config).items())
        raise UserError(
            f"config.mesh ({asked}) does not fit {len(devices)} devices: the product of the axes"
            " must equal the number of devices; set one axis to -1 to let it take what remains"
        )
    data, fsdp, stream, tensor = sizes
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(
            f"config.mesh.data is {data}: must be a multiple of {slices}, the number of TPU slices"
        )
    inner = _shared_fsdp(devices, fsdp, stream * tensor)
    shape = (data // slices, fsdp // inner, inner, stream, tensor)
    if slices > 1:
        across = (slices, 1, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, across, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _shared_fsdp(devices: Sequence[Any], fsdp: int, within: int) -> int:
    """The size of `fsdp_inner`.

    With `stream` and `tensor` it fills a physical axis of the torus. It is 1 if no axis fits.

    Args:
      within: devices along `stream` and `tensor` together.
    """
    if not hasattr(devices[0], "coords"):
        return 1
    dimensions = range(len(devices[0].coords))
    lengths = {1 + max(device.coords[i] for device in devices) for i in dimensions}
    for length in sorted(lengths):
        if length > 1 and length % within == 0 and fsdp % (length // within) == 0:
            return length // within
    return 1


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raises UserError if a mesh axis does not divide a size that is sharded over it."""
    model = config.model
    lengths = {
        "batch": (
            config.data.batch_size // config.optim.accumulate,
            "data.batch_size / optim.accumulate",
        ),
        "heads": (model.num_heads, "model.num_heads"),
        "kv_heads": (model.num_kv_heads // model.kv_parts, "model.num_kv_heads / model.kv_parts"),
        "mlp": (model.d_ff, "model.d_ff"),
        "embed": (model.d_model, "model.d_model"),
        "vocab": (model.vocab_size, "model.vocab_size"),
    }
    check_lengths(lengths, mesh)


def check_lengths(lengths: dict[str, tuple[int, str]], mesh: Mesh) -> None:
    """Raises UserError if the mesh does not divide a length.

    Args:
      lengths: {logical axis: (length, name of the length in messages)}.
    """
    for axis, (length, name) in lengths.items():
        parts = int(np.prod([mesh.shape[a] for a in mesh_axes(axis)]))
        if length % parts:
            sizes = " x ".join(f"{a}={mesh.shape[a]}" for a in mesh_axes(axis))
            raise UserError(
                f"the mesh does not divide {name}: {length} over {sizes}; choose mesh axes whose"
                f" product divides {length}, or change {name}"
            )


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis, over all stages."""
    return tuple(name for stage in RULES[axis] for name in _names(stage))


def partition_spec(*axes: str) -> PartitionSpec:
    """The PartitionSpec of logical axes. Raises ValueError if two of them share a mesh axis."""
    used = [name for axis in axes for name in mesh_axes(axis)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
    return PartitionSpec(*(mesh_axes(axis) or None for axis in axes))


def named_sharding(mesh: Mesh, *axes: str) -> NamedSharding:
    """The NamedSharding of logical axes on `mesh`."""
    return NamedSharding(mesh, partition_spec(*axes))


def axis_size(axis: str) -> int:
    """Devices along a mesh axis inside `shard_map`; 1 outside, so model code runs in both."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_index(axis: str) -> jax.Array | int:
    """This device's index along a mesh axis inside `shard_map`; 0 outside."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def _names(stage: Stage) -> tuple[str, ...]:
    return (stage,) if isinstance(stage, str) else stage


def _used(stage: Stage) -> tuple[str, ...]:
    """The mesh axes of a stage that have more than one device."""
    return tuple(axis for axis in _names(stage) if axis_size(axis) > 1)


def gather(x: jax.Array, axis: int, stages: Sequence[Stage]) -> jax.Array:
    """Gathers the whole array from the shards of the devices.

    In the backward pass each stage becomes a reduce-scatter. The sharded dimension is moved to the
    front, in memory as well. For another dimension XLA:TPU often falls back to an all-reduce of the
    whole array.

    Args:
      x: the shard of this device.
      axis: the dimension that is sharded.
      stages: the mesh axes over which it is sharded, as in RULES. The last stage is gathered first.
    """
    used = [names for stage in reversed(stages) if (names := _used(stage))]
    if not used:
        return x
    x = jnp.moveaxis(x, axis, 0)
    inner = x.shape[1:]
    if x.ndim > 3:
        x = x.reshape(x.shape[0], -1, x.shape[-1])
    for names in used:
        x = jax.lax.all_gather(x, names, tiled=True)
        x = _row_major_gradient(x) if x.ndim == 2 else x
    return jnp.moveaxis(x.reshape(-1, *inner), 0, axis)


@jax.custom_vjp
def _row_major_gradient(x):
    """The identity on a matrix. Its gradient is laid out row by row in memory."""
    return x


def _row_major_forward(x):
    return x, None


def _row_major_backward(_, gradient):
    return (with_layout_constraint(gradient, Layout((0, 1))),)


_row_major_gradient.defvjp(_row_major_forward, _row_major_backward)


def gather_streams(x: jax.Array) -> jax.Array:
    """Gathers all streams: [B, T, streams of this device, ...] -> [B, T, S, ...]."""
    return gather(x, 2, ("stream",))


def rows_to_cells(x: jax.Array) -> jax.Array:
    """Exchanges some columns of all devices' cells for all columns of this device's cells.

    Args:
      x: [B of all devices along `fsdp`, T, S, columns of this device along `embed`].

    Returns: [B, T, S of this device, D].
    """
    if axis_size("stream") > 1:
        x = jax.lax.all_to_all(x, "stream", 2, x.ndim - 1, tiled=True)
    if names := _used(FSDP):
        x = jax.lax.all_to_all(x, names, 0, x.ndim - 1, tiled=True)
    return x


@dataclasses.dataclass(frozen=True)
class StreamSubset:
    """A subset of the streams on each device, inside `shard_map`.

    All devices along the mesh axis `stream` run the same program. So a place in the local stream
    dimension can be left out only if no device needs the stream that it holds there.

    Attributes:
      size: the number of streams on each device.
      places: indices into the local stream dimension that are in the subset.
    """

    size: int
    places: tuple[int, ...]

    @classmethod
    def of(cls, needed: Sequence[bool], size: int) -> StreamSubset:
        """The subset of the places that some device needs.

        Args:
          needed: whether each stream is needed, for the streams of all devices in order.
          size: the number of streams on each device.
        """
        return cls(size, tuple(place for place in range(size) if any(needed[place::size])))

    def take(self, x: jax.Array, axis: int) -> jax.Array:
        """The subset of x, whose dimension `axis` holds the streams of this device."""
        return x if self._is_all else x[(slice(None),) * axis + (jnp.array(self.places),)]

    def put(self, x: jax.Array, into: jax.Array) -> jax.Array:
        """`into` with x at the places of the subset in its last dimension."""
        return x if self._is_all else into.at[..., jnp.array(self.places)].set(x)

    @property
    def _is_all(self) -> bool:
        return len(self.places) == self.size


def psum(x: Any, *names: str) -> Any:
    """The sum of a pytree over mesh axes inside `shard_map`; x itself outside."""
    axes = _used(names)
    return jax.lax.psum(x, axes) if axes else x


def pmax_over_mesh(x: jax.Array) -> jax.Array:
    """The maximum over all devices inside `shard_map`; x itself outside."""
    axes = _used(tuple(jax.sharding.get_abstract_mesh().manual_axes))
    return jax.lax.pmax(x, axes) if axes else x


# The logical axes of the arrays of a batch.
BATCH_AXES: dict[str, tuple[str, ...]] = {
    "tokens": ("batch", "row", "stream"),
    "present": ("batch", "row", "stream"),
    "segment": ("batch", "row"),
    "weights": ("batch", "row", "stream"),  # only of data with loss weights of cells
    # drawn in the step (msllm/model/draws.py)
    "identity": ("batch", "row", "replicated"),
    "lag_draw": ("batch", "replicated"),
}
