"""The cost of a step by formula: FLOPs, memory traffic, use of memory, and the time at the peaks of
the hardware.

Everything is per device and per step. An estimate says what the peaks allow; it is not a
prediction: no product reaches the peak, and no kernel is charged for its launch. ASSUMPTIONS lists
every assumption, and reports print it.
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
    "is their share of the peak.",
    "Hardware FLOPs add what is computed again or without use: the layer under remat=full and "
    "offload (all but its last product), scores in the backward pass of blockwise attention (the "
    "kernels of splash: once more, and the gradients of the softmax's weights twice), logits twice "
    "where the head comes in parts, the head for streams without weight that share a program with "
    "others, all products for streams that only fill up the mesh axis. Masked pairs inside an "
    "attention block are not counted.",
    "Compute runs at the dense bfloat16 peak, also where an operand is float32.",
    "HBM traffic: state read and written once, gradients once per micro-batch; gathered weights "
    "written and read once per pass; operands and results of each product once per pass; logits "
    "five times and the head once per chunk of the loss, both more often where the head comes in "
    "parts. The rows of the embedding are not counted.",
    "ICI: every mesh axis is a ring on one axis of the torus with both directions in use; "
    "different axes do not disturb each other. All-gather and reduce-scatter move (n-1)/n of their "
    "bytes, all-reduce twice that, all-to-all a quarter of a ring's length times its bytes per "
    "torus axis, a permute its bytes over one link.",
    "With remat=offload the input of each layer goes to the memory of the host and comes back "
    "while other layers are computed: its time is not counted.",
    "DCN: what the compiler sends between slices, at each device's share of the network.",
    "Step time: asynchronous collectives hide behind compute and HBM traffic, which hide behind "
    "each other; synchronous ones add to it. The bounds are everything hidden, and nothing hidden.",
    "A loop whose length depends on the data counts once.",
)
# Products of the size of the attention scores that the backward pass computes again.
_SCORES_AGAIN = {"reference": 0, "splash": 3}
_BLOCKWISE = 1  # the same for other backends


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one device holds of a model and a batch."""

    config: Config
    streams: StreamSpec
    mesh: Mapping[str, int]
    attention: str  # name of the attention backend

    def parts(self, axis: str) -> int:
        """The number of devices that a logical axis is spread over."""
        return math.prod(self.mesh.get(name, 1) for name in mesh_axes(axis))

    @property
    def devices(self) -> int:
        """All devices of the mesh."""
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
        """Streams on one device, with the absent ones that fill up the mesh axis."""
        return -(-self.streams.size // self.parts("stream"))

    @property
    def head_streams(self) -> int:
        """Streams that the head is computed for: all devices of the stream axis run one program."""
        size = self.streams_per_device
        computed = sum(any(self.streams.loss_weights[s::size]) for s in range(size))
        return computed * self.parts("stream")

    @property
    def head_cells(self) -> float:
        """Cells of one micro-batch on one device that the head is computed for."""
        return self.tables * self.config.data.rows * self.head_streams / self.parts("stream")

    @property
    def item(self) -> int:
        """Bytes of a value in the compute dtype."""
        return 2 if self.config.model.compute_dtype == "bfloat16" else 4

    @property
    def query_width(self) -> float:
        """Query values of a cell on one device."""
        return self.config.model.num_heads * self.config.model.head_dim / self.parts("heads")

    @property
    def kv_width(self) -> float:
        """Key and value values of a cell on one device."""
        return 2 * self.config.model.num_kv_heads * self.config.model.head_dim / self.parts("heads")

    @property
    def ffn_width(self) -> float:
        """Values of a cell between the products of the MLP, on one device."""
        return self.config.model.d_ff / self.parts("mlp")

    @property
    def vocab_width(self) -> float:
        """Logits of a cell on one device."""
        return self.config.model.vocab_size / self.parts("vocab")

    @property
    def layer_weights(self) -> float:
        """Values of one layer's matrices after they are gathered."""
        attention = 2 * self.query_width + self.kv_width
        return self.config.model.d_model * (attention + 3 * self.ffn_width)

    @property
    def table(self) -> float:
        """Values of the embedding (or the head) on one device when d_model is gathered."""
        return self.config.model.vocab_size * self.config.model.d_model / self.parts("vocab")

    @property
    def layer_values(self) -> float:
        """Values per cell that the products and norms of one layer read and write on one device."""
        d, q, kv, f = (
            self.config.model.d_model,
            self.query_width,
            self.kv_width,
            self.ffn_width,
        )
        return sum(
            (
                4 * d,  # norms
                d + q + kv,  # projections
                2 * q + kv,  # attention
                q + d,  # its output
                d + 2 * f,  # gate and up
                3 * f + d,  # down
            )
        )


def flops(shape: Shape) -> dict[str, float]:
    """FLOPs of a step on one device.

    Returns:
      `useful`, what each kind of extra work adds, and `hardware`, the sum of all.
    """
    model, data, streams = shape.config.model, shape.config.data, shape.streams
    rows = data.batch_size * data.rows
    pairs = data.batch_size * visible_pairs(streams.lag_array, data.rows)
    # Forward passes: of attention over all streams, of one stream's layer, of one stream's head.
    attention = attention_flops(model.num_heads, model.head_dim, pairs)
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    all_but_down = 2 * rows * model.d_model * (heads + 2 * model.d_ff)
    layer = all_but_down + 2 * rows * model.d_model * model.d_ff
    head = 2 * rows * model.d_model * model.vocab_size

    recomputed = all_but_down if model.remat in INPUT_ONLY else 0
    remat = streams.size * all_but_down + attention if model.remat in INPUT_ONLY else 0
    again = _SCORES_AGAIN.get(shape.attention, _BLOCKWISE)
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
    """Bytes that a step moves between the memory and the cores of one device, by use.

    `state_bytes`: parameters and moments on one device.
    """
    config, model, item = shape.config, shape.config.model, shape.item
    micro, again = config.optim.accumulate, model.remat in INPUT_ONLY
    gradients = state_bytes / 3  # as many as parameters, which are a third of the state
    weights = model.num_layers * shape.layer_weights * item
    activations = model.num_layers * shape.layer_values * shape.cells * item
    return {
        "state": 2 * state_bytes + 2 * micro * gradients,
        "weights": micro * (6 + 2 * again) * weights,
        "activations": micro * (3 + again) * activations,
        "head": micro * _head_bytes(shape),
    }


def _head_bytes(shape: Shape) -> float:
    """HBM traffic of the head and the loss in one micro-batch."""
    cells, item, parts = shape.head_cells, shape.item, shape.config.loss.vocab_chunks
    chunks = math.ceil(cells / min(shape.config.loss.chunk_tokens, cells))
    # Each logit moves four times in float32 and once in the compute dtype.
    logits = cells * shape.vocab_width * (4 * 4 + item)
    traffic = logits + chunks * shape.table * (3 * item + 8)
    if parts > 1:
        # The logits once more, and for each part the hidden states twice and their gradient in
        # float32.
        traffic += cells * shape.vocab_width * 8 + chunks * shape.table * item
        traffic += parts * cells * shape.config.model.d_model * (2 * item + 8)
    return traffic


def host_bytes(shape: Shape) -> float:
    """Bytes that a step with remat=offload moves to the memory of the host; as many come back."""
    model = shape.config.model
    if model.remat != "offload":
        return 0
    cells = shape.cells * shape.config.optim.accumulate
    return model.num_layers * cells * model.d_model * shape.item


def memory_parts(shape: Shape, state_bytes: float) -> dict[str, float]:
    """Bytes of memory by use and formula: not exact, but they say what to change first."""
    config, model, item, cells = shape.config, shape.config.model, shape.item, shape.cells
    q, kv, f = shape.query_width, shape.kv_width, shape.ffn_width
    kept = {
        "offload": 0,
        "full": model.d_model,
        "dots": 2 * model.d_model + 2 * q + kv + 2 * f,
        "none": shape.layer_values,
    }
    if model.kv_ring:
        keys = 2 * cells * kv * (item + 4)  # of two devices, the gradients in float32
    else:
        # Keys and values of all devices of the stream axis, and their gradients.
        keys = 2 * cells * shape.parts("stream") * kv * item
    # With remat=none, what one layer has gathered is kept until its backward pass.
    every_layer = model.remat == "none"
    layers_of_keys = model.num_layers if every_layer and model.kv_parts == 1 else 1
    layers_of_weights = model.num_layers if every_layer else 2  # in use, and on their way
    # The head: gathered, its gradient in float32, and that in the compute dtype on its way.
    head = shape.table / config.loss.vocab_chunks * (2 * item + 4)
    embedding = cells * model.d_model * (2 * item + 4)  # its rows
    logits = min(config.loss.chunk_tokens, shape.head_cells) * shape.vocab_width
    return {
        "state": state_bytes,
        "gradients": state_bytes / 3,
        "kept_activations": model.num_layers * kept[model.remat] * cells * item,
        "one_layer": shape.layer_values * cells * item,
        "gathered_keys": layers_of_keys * keys / model.kv_parts,
        "gathered_weights": layers_of_weights * shape.layer_weights * item,
        "logits": logits / config.loss.vocab_chunks * (8 + item),
        "tables": head + embedding,
    }


REMEDIES = {
    "state": "more devices along mesh.fsdp (or mesh.stream): state is spread over them",
    "gradients": "more devices along mesh.fsdp (or mesh.stream): gradients are spread over them",
    "kept_activations": "config.model.remat='full', or 'offload', which keeps them in the memory "
    "of the host",
    "one_layer": "fewer tables a device: a smaller data.batch_size or a larger optim.accumulate",
    "gathered_keys": "a larger config.model.kv_parts: keys and values are gathered in that many "
    "parts; or config.model.kv_ring",
    "gathered_weights": "more devices along mesh.tensor: it divides heads and ffn",
    "logits": "a smaller config.loss.chunk_tokens",
    "tables": "a larger config.loss.vocab_chunks: the head is gathered in that many parts",
}


def remedies(shape: Shape, state_bytes: float) -> list[str]:
    """At most three changes that save memory, that of the largest part first."""
    parts = memory_parts(shape, state_bytes)
    remedy, model = dict(REMEDIES), shape.config.model
    if model.remat == "full":
        remedy["kept_activations"] = (
            "config.model.remat='offload': layer inputs wait in the memory of the host"
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
    """Seconds that all executions of a collective take on its network.

    Args:
      collective: what is moved.
      devices: those of the mesh, in its order.
      hardware: its bandwidths; the result is nan where one is not known.
    """
    group = [devices[i] for i in collective.groups[0]]
    if collective.dcn:
        slices = len({device.slice_index for device in group})
        moved = _dcn_bytes(collective, slices)
        return moved * collective.count / (hardware.dcn_bandwidth or math.nan)
    return _link_bytes(collective, group) * collective.count / (hardware.ici_bandwidth or math.nan)


def _around(collective: Collective, size: int) -> float:
    """Bytes that a device of a ring passes on in an all-gather or a reduce-scatter."""
    return (size - 1) / size * collective.bytes


def _dcn_bytes(collective: Collective, slices: int) -> float:
    """Bytes of one execution that a device sends to other slices."""
    if collective.kind == "collective-permute":
        return collective.bytes
    return (2 if collective.kind == "all-reduce" else 1) * _around(collective, slices)


def _link_bytes(collective: Collective, group: Sequence[Any]) -> float:
    """Bytes of one execution that cross the busiest ICI link, both of a ring's directions used."""
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
    """Times in seconds, MFU and arithmetic intensity of a step, as a dict for JSON.

    Args:
      shape: the model and the batch.
      state_bytes: parameters and moments on one device.
      collectives: those of the compiled step.
      devices: those of the mesh, in its order.
      hardware: the peaks of a device.
    """
    work, traffic = flops(shape), hbm_bytes(shape, state_bytes)
    moved = sum(traffic.values())
    compute, hbm = work["hardware"] / hardware.flops, moved / hardware.hbm_bandwidth
    networks = _network_seconds(shape, collectives, devices, hardware)
    hidden = [network["asynchronous"] for network in networks.values()]
    exposed = sum(network["synchronous"] for network in networks.values())
    links = [sum(network.values()) for network in networks.values()]
    # np.max keeps nan, where a figure of the hardware is not known.
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
    """{network: {"asynchronous": seconds, "synchronous": seconds}}; each mesh axis is a network."""
    networks: dict[str, dict[str, float]] = {}
    for collective in collectives:
        axes = "+".join(axes_of(collective.groups, shape.mesh)) or "none"
        name = "DCN" if collective.dcn else f"ICI {axes}"
        network = networks.setdefault(name, {"asynchronous": 0.0, "synchronous": 0.0})
        kind = "asynchronous" if collective.asynchronous else "synchronous"
        network[kind] += transfer_seconds(collective, devices, hardware)
    return networks
