"""Estimates the cost of a step by formula: FLOPs, HBM traffic, memory use and step time.

All figures are for one device and one step. An estimate says what the hardware's peaks allow. It is
not a prediction: matrix products do not reach the peak, and the estimate ignores the launch time of
kernels. ASSUMPTIONS lists all assumptions, and reports print them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msllm.config import INPUT_ONLY, Config
from msllm.pod.collectives import Collective, axes_of
from msllm.runtime.flops import attention_flops, train_flops, visible_pairs
from msllm.runtime.hardware import Hardware
from msllm.sharding import mesh_axes
from msllm.streams import StreamSpec

ASSUMPTIONS = (
    "Useful FLOPs are what the visibility rule needs for full tables (msllm/runtime/flops.py). MFU "
    "is useful FLOPs per second divided by the peak.",
    "Hardware FLOPs add recomputed and unused work: each layer except its last product with "
    "remat=full or offload; the scores in the backward pass of blockwise attention (splash "
    "computes both the scores and the gradients of the softmax weights twice there); a second pass "
    "over the logits if loss.vocab_chunks > 1; the head of streams without loss weight that share "
    "a program with other streams; all products of streams that only pad the mesh axis. Masked "
    "pairs inside an attention block are not counted.",
    "Compute runs at the dense bfloat16 peak, even with float32 operands.",
    "HBM traffic: the state is read and written once, and gradients once per micro-batch; gathered "
    "weights are written and read once per pass, as are the operands and results of each product; "
    "logits move five times and the head once per loss chunk, and more often if loss.vocab_chunks "
    "> 1. Embedding rows are not counted.",
    "ICI: every mesh axis is a ring along one torus axis and uses both directions; mesh axes do "
    "not share links. Each device moves (n-1)/n of the bytes in an all-gather or reduce-scatter "
    "over n devices, and twice that in an all-reduce. An all-to-all moves a quarter of the ring "
    "length times its bytes per torus axis. A permute moves its bytes over one link.",
    "With remat=offload, layer inputs move to host memory and back while other layers compute. The "
    "estimate does not include the time of these transfers.",
    "DCN: the bytes that the compiler sends between slices, at each device's share of the network.",
    "Step time: asynchronous collectives overlap with compute and HBM traffic, which overlap with "
    "each other; synchronous collectives add to the step time. For the lower bound everything "
    "overlaps, for the upper bound nothing does.",
    "A loop whose trip count depends on the data counts once.",
)
# How many products of the size of the attention scores the backward pass recomputes.
_RECOMPUTED_SCORES = {"reference": 0, "splash": 3}
_RECOMPUTED_SCORES_BLOCKWISE = 1  # for all other backends


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one device's share of a model and a batch.

    Attributes:
      config: the config of the run.
      streams: the streams of the model.
      mesh: {axis: size}.
      attention: name of the attention backend.
    """

    config: Config
    streams: StreamSpec
    mesh: Mapping[str, int]
    attention: str

    def parts(self, axis: str) -> int:
        """Returns the number of devices that a logical axis is sharded over."""
        return math.prod(self.mesh.get(name, 1) for name in mesh_axes(axis))

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def tables(self) -> float:
        """Tables of one micro-batch on one device."""
        return self.config.data.batch_size / self.config.optim.accumulate / self.parts("batch")

    @property
    def cells(self) -> float:
        """Cells of one micro-batch on one device."""
        return self.tables * self.config.data.rows * self.streams_per_device

    @property
    def streams_per_device(self) -> int:
        """Streams on one device, including absent streams that pad the mesh axis."""
        return -(-self.streams.size // self.parts("stream"))

    @property
    def head_streams(self) -> int:
        """Streams for which the head runs: all devices of the stream axis run the same program."""
        size = self.streams_per_device
        computed = sum(any(self.streams.loss_weights[s::size]) for s in range(size))
        return computed * self.parts("stream")

    @property
    def head_cells(self) -> float:
        """Cells of one micro-batch on one device for which the head runs."""
        return self.tables * self.config.data.rows * self.head_streams / self.parts("stream")

    @property
    def item(self) -> int:
        """Bytes of a value in the compute dtype."""
        return 2 if self.config.model.compute_dtype == "bfloat16" else 4

    @property
    def query_width(self) -> float:
        """Width of a cell's query on one device."""
        return self.config.model.num_heads * self.config.model.head_dim / self.parts("heads")

    @property
    def kv_width(self) -> float:
        """Width of a cell's key and value together on one device."""
        return 2 * self.config.model.num_kv_heads * self.config.model.head_dim / self.parts("heads")

    @property
    def ffn_width(self) -> float:
        """Width of a cell inside the MLP on one device."""
        return self.config.model.d_ff / self.parts("mlp")

    @property
    def vocab_width(self) -> float:
        """Number of logits of a cell on one device."""
        return self.config.model.vocab_size / self.parts("vocab")

    @property
    def layer_weights(self) -> float:
        """Number of values in one layer's matrices on one device after the gather."""
        attention = 2 * self.query_width + self.kv_width
        return self.config.model.d_model * (attention + 3 * self.ffn_width)

    @property
    def table(self) -> float:
        """Number of values in the embedding (or the head) on one device after the gather."""
        return self.config.model.vocab_size * self.config.model.d_model / self.parts("vocab")

    @property
    def layer_values(self) -> float:
        """Values per cell that one layer's products and norms read and write on one device."""
        d, q, kv, f = self.config.model.d_model, self.query_width, self.kv_width, self.ffn_width
        norms = 4 * d
        projections = d + q + kv
        attention = 2 * q + kv
        output_projection = q + d
        gate_and_up = d + 2 * f
        down = 3 * f + d
        return norms + projections + attention + output_projection + gate_and_up + down


def flops(shape: Shape) -> dict[str, float]:
    """Returns the FLOPs of a step on one device.

    Returns:
      `useful`, the FLOPs of each kind of extra work, and `hardware`, the sum of all.
    """
    model, data, streams = shape.config.model, shape.config.data, shape.streams
    rows = data.batch_size * data.rows
    pairs = data.batch_size * visible_pairs(streams.nearest_lag_array, data.rows)
    # Forward FLOPs of attention over all streams, and of the layer and the head for one stream.
    attention = attention_flops(model.num_heads, model.head_dim, pairs)
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    all_but_down = 2 * rows * model.d_model * (heads + 2 * model.d_ff)
    layer = all_but_down + 2 * rows * model.d_model * model.d_ff
    head = 2 * rows * model.d_model * model.vocab_size

    recomputed = all_but_down if model.remat in INPUT_ONLY else 0
    remat = streams.size * all_but_down + attention if model.remat in INPUT_ONLY else 0
    again = _RECOMPUTED_SCORES.get(shape.attention, _RECOMPUTED_SCORES_BLOCKWISE)
    trained = sum(weight > 0 for weight in streams.loss_weights)
    absent = shape.streams_per_device * shape.parts("stream") - streams.size
    total = {
        "useful": train_flops(model, streams, data.batch_size, data.rows),
        "remat": model.num_layers * remat,
        "attention_scores_again": again * model.num_layers * attention // 2,
        "logits_again": shape.head_streams * head if shape.config.loss.vocab_chunks > 1 else 0,
        "head_without_weight": 3 * (shape.head_streams - trained) * head,
        "absent_streams": absent * model.num_layers * (3 * layer + recomputed),
    }
    result = {name: value / shape.devices for name, value in total.items()}
    return {**result, "hardware": sum(result.values())}


def hbm_bytes(shape: Shape, state_bytes: float) -> dict[str, float]:
    """Returns the HBM traffic of a step on one device in bytes, by use.

    Args:
      shape: sizes of the model and the batch.
      state_bytes: bytes of parameters and moments on one device.
    """
    config, model, item = shape.config, shape.config.model, shape.item
    micro, recomputed = config.optim.accumulate, model.remat in INPUT_ONLY
    gradients = state_bytes / 3  # the size of the parameters; the state adds two moments
    weights = model.num_layers * shape.layer_weights * item
    activations = model.num_layers * shape.layer_values * shape.cells * item
    return {
        "state": 2 * state_bytes + 2 * micro * gradients,
        "weights": micro * (6 + 2 * recomputed) * weights,
        "activations": micro * (3 + recomputed) * activations,
        "head": micro * _head_bytes(shape),
    }


def _head_bytes(shape: Shape) -> float:
    """Returns the HBM traffic of the head and the loss in one micro-batch, in bytes."""
    cells, item, parts = shape.head_cells, shape.item, shape.config.loss.vocab_chunks
    chunks = math.ceil(cells / min(shape.config.loss.chunk_tokens, cells))
    # Each logit moves four times in float32 and once in the compute dtype.
    logits = cells * shape.vocab_width * (4 * 4 + item)
    traffic = logits + chunks * shape.table * (3 * item + 8)
    if parts > 1:
        # The logits move once more. For each part, the hidden states move twice, and their float32
        # gradient is read and written.
        traffic += cells * shape.vocab_width * 8 + chunks * shape.table * item
        traffic += parts * cells * shape.config.model.d_model * (2 * item + 8)
    return traffic


def host_bytes(shape: Shape) -> float:
    """Returns the bytes that a step moves to host memory with remat=offload, and again back."""
    model = shape.config.model
    if model.remat != "offload":
        return 0
    cells = shape.cells * shape.config.optim.accumulate
    return model.num_layers * cells * model.d_model * shape.item


def memory_parts(shape: Shape, state_bytes: float) -> dict[str, float]:
    """Returns approximate bytes of memory by use, which show what to change first.

    Args:
      shape: sizes of the model and the batch.
      state_bytes: bytes of parameters and moments on one device.
    """
    config, model, item, cells = shape.config, shape.config.model, shape.item, shape.cells
    q, kv, f = shape.query_width, shape.kv_width, shape.ffn_width
    saved = {
        "offload": 0,
        "full": model.d_model,
        "dots": 2 * model.d_model + 2 * q + kv + 2 * f,
        "none": shape.layer_values,
    }
    if model.kv_ring:
        # Keys and values of two devices, with float32 gradients.
        keys = 2 * cells * kv * (item + 4)
    else:
        # Keys and values of all devices of the stream axis, with gradients.
        keys = 2 * cells * shape.parts("stream") * kv * item
    # With remat=none, gathered arrays of a layer stay in memory until its backward pass.
    every_layer = model.remat == "none"
    layers_of_keys = model.num_layers if every_layer and model.kv_parts == 1 else 1
    # Otherwise: the weights of the current layer, and those of the next one, in transfer.
    layers_of_weights = model.num_layers if every_layer else 2
    # The gathered head, its gradient in float32, and the gradient in the compute dtype in transfer.
    head = shape.table / config.loss.vocab_chunks * (2 * item + 4)
    # The same for the looked-up rows of the embedding.
    embedding = cells * model.d_model * (2 * item + 4)
    logits = min(config.loss.chunk_tokens, shape.head_cells) * shape.vocab_width
    return {
        "state": state_bytes,
        "gradients": state_bytes / 3,
        "kept_activations": model.num_layers * saved[model.remat] * cells * item,
        "one_layer": shape.layer_values * cells * item,
        "gathered_keys": layers_of_keys * keys / model.kv_parts,
        "gathered_weights": layers_of_weights * shape.layer_weights * item,
        "logits": logits / config.loss.vocab_chunks * (8 + item),
        "tables": head + embedding,
    }


# The change that reduces each use in `memory_parts`.
REMEDIES = {
    "state": "more devices along mesh.fsdp or mesh.stream, which shard the state",
    "gradients": "more devices along mesh.fsdp or mesh.stream, which shard the gradients",
    "kept_activations": "config.model.remat='full', or 'offload', which saves them in host memory",
    "one_layer": "fewer tables per device: a smaller data.batch_size or a larger optim.accumulate",
    "gathered_keys": "a larger config.model.kv_parts, which gathers keys and values in more parts; "
    "or config.model.kv_ring",
    "gathered_weights": "more devices along mesh.tensor, which shards heads and ffn",
    "logits": "a smaller config.loss.chunk_tokens",
    "tables": "a larger config.loss.vocab_chunks, which gathers the head in more parts",
}


def remedies(shape: Shape, state_bytes: float) -> list[str]:
    """Returns up to three changes that save memory, for the largest uses first.

    Args:
      shape: sizes of the model and the batch.
      state_bytes: bytes of parameters and moments on one device.
    """
    parts = memory_parts(shape, state_bytes)
    remedy, model = dict(REMEDIES), shape.config.model
    if model.remat == "full":
        remedy["kept_activations"] = (
            "config.model.remat='offload', which saves layer inputs in host memory"
        )
    if model.kv_ring:
        remedy["gathered_keys"] = remedy["one_layer"]
    if model.remat == "none":
        remedy["gathered_weights"] = remedy["kept_activations"]
    lines: dict[str, str] = {}  # {remedy: line}, each remedy once
    for part in sorted(parts, key=lambda part: -parts[part]):
        size = f"{part}: {parts[part] / 2**30:.2f} GiB by formula"
        lines.setdefault(remedy[part], f"{remedy[part]} ({size})")
    return list(lines.values())[:3]


def transfer_seconds(collective: Collective, devices: Sequence[Any], hardware: Hardware) -> float:
    """Returns the seconds that all executions of a collective take on its network.

    Args:
      collective: the collective.
      devices: the devices of the mesh, in mesh order.
      hardware: the bandwidths. The result is nan if the one it needs is unknown.
    """
    group = [devices[i] for i in collective.groups[0]]
    if collective.dcn:
        slices = len({device.slice_index for device in group})
        moved = _dcn_bytes(collective, slices)
        return moved * collective.count / (hardware.dcn_bandwidth or math.nan)
    return _link_bytes(collective, group) * collective.count / (hardware.ici_bandwidth or math.nan)


def _around(collective: Collective, size: int) -> float:
    """Returns the bytes that a device in a ring sends in an all-gather or a reduce-scatter."""
    return (size - 1) / size * collective.bytes


def _dcn_bytes(collective: Collective, slices: int) -> float:
    """Returns the bytes that a device sends to other slices in one execution."""
    if collective.kind == "collective-permute":
        return collective.bytes
    return (2 if collective.kind == "all-reduce" else 1) * _around(collective, slices)


def _link_bytes(collective: Collective, group: Sequence[Any]) -> float:
    """Returns the bytes that cross the busiest ICI link in one execution.

    Collectives on a ring use both of its directions.
    """
    if collective.kind == "collective-permute":
        return collective.bytes
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        lengths = [len(set(along)) for along in zip(*(device.coords for device in group))]
        rings = [length for length in lengths if length > 1] or [1]
        # The shorter way around is a quarter of the ring on average; each ring has two links.
        return collective.bytes * sum(rings) / 4 / (2 * len(rings))
    around = _around(collective, len(group))
    return (2 if collective.kind == "all-reduce" else 1) * around / 2


def estimate(
    shape: Shape,
    state_bytes: float,
    collectives: Sequence[Collective],
    devices: Sequence[Any],
    hardware: Hardware,
) -> dict[str, Any]:
    """Estimates the times (in seconds), MFU and arithmetic intensity of a step.

    Args:
      shape: sizes of the model and the batch.
      state_bytes: bytes of parameters and moments on one device.
      collectives: the collectives of the compiled step.
      devices: the devices of the mesh, in mesh order.
      hardware: the peaks of a device.
    """
    work, traffic = flops(shape), hbm_bytes(shape, state_bytes)
    moved = sum(traffic.values())
    compute, hbm = work["hardware"] / hardware.flops, moved / hardware.hbm_bandwidth
    networks = _network_seconds(shape, collectives, devices, hardware)
    hidden = [network["asynchronous"] for network in networks.values()]
    exposed = sum(network["synchronous"] for network in networks.values())
    links = [sum(network.values()) for network in networks.values()]
    # A time is nan if its hardware figure is unknown. np.max propagates nan.
    seconds = float(np.max([compute, hbm, *hidden])) + exposed
    shortest, longest = float(np.max([compute, hbm, *links])), compute + hbm + sum(links)
    useful = work["useful"] / hardware.flops
    return {
        "flops": work,
        "hbm_bytes": {**traffic, "total": moved},
        "host_bytes": host_bytes(shape),
        "arithmetic_intensity": work["hardware"] / moved,
        "intensity_of_the_hardware": hardware.flops / hardware.hbm_bandwidth,
        "compute_seconds": compute,
        "hbm_seconds": hbm,
        "network_seconds": networks,
        "step_seconds": seconds,
        "step_seconds_bounds": [shortest, longest],
        "mfu": useful / seconds,
        "mfu_bounds": [useful / longest, useful / shortest],
        "tokens_per_second_and_device": shape.cells * shape.config.optim.accumulate / seconds,
    }


def _network_seconds(
    shape: Shape, collectives: Sequence[Collective], devices: Sequence[Any], hardware: Hardware
) -> dict[str, dict[str, float]]:
    """Returns seconds by network and kind. DCN and each (combination of) mesh axes is a network."""
    networks: dict[str, dict[str, float]] = {}
    for collective in collectives:
        axes = "+".join(axes_of(collective.groups, shape.mesh)) or "none"
        name = "DCN" if collective.dcn else f"ICI {axes}"
        network = networks.setdefault(name, {"asynchronous": 0.0, "synchronous": 0.0})
        kind = "asynchronous" if collective.asynchronous else "synchronous"
        network[kind] += transfer_seconds(collective, devices, hardware)
    return networks
