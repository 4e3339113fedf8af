"""What a step should cost by formula: FLOPs, memory traffic, where memory goes, and the time that follows from peaks.

Everything is per device and per step. An estimate is what the hardware's peaks allow, not a prediction: no product
reaches the peak, and no kernel is charged for being launched. Every assumption is in ASSUMPTIONS, which reports print.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from msllm.config import INPUT_ONLY, Config
from msllm.pod.hlo import Collective, axes_of
from msllm.runtime.flops import train_flops, visible_pairs
from msllm.runtime.hardware import Hardware
from msllm.sharding import mesh_axes
from msllm.streams import StreamSpec

ASSUMPTIONS = (
    "Useful FLOPs are what the visibility rule needs for full tables (msllm/runtime/flops.py). MFU is their share of the peak.",
    "Hardware FLOPs add what is computed again or in vain: the layer under remat=full and offload (all but its last product), "
    "scores in the backward pass of blockwise attention (the kernels of splash: once more, and the gradients of the "
    "weights of the softmax twice), logits twice where the head comes in parts, the head for streams without weight "
    "that share a program with others, all products for streams that only fill up the mesh axis. Masked pairs inside an "
    "attention block are not counted.",
    "Compute runs at the dense bfloat16 peak, also where an operand is float32.",
    "HBM traffic: state read and written once, gradients once per micro-batch; gathered weights written and read once "
    "per pass; operands and results of each product once per pass; logits five times and the head once per chunk of "
    "the loss, both more often where the head comes in parts. The rows of the embedding are not counted.",
    "ICI: every mesh axis is a ring on one axis of the torus with both directions in use; different axes do not "
    "disturb each other. All-gather and reduce-scatter move (n-1)/n of their bytes, all-reduce twice that, all-to-all "
    "a quarter of a ring's length times its bytes per torus axis, a permute its bytes over one link.",
    "With remat=offload each layer's input goes to the host's memory and comes back while others are computed: its time "
    "is not counted.",
    "DCN: what the compiler sends between slices, at each device's part of the network.",
    "Step time: asynchronous collectives hide behind compute and HBM traffic, which hide behind each other; "
    "synchronous ones add to it. The bounds are everything hidden, and nothing hidden.",
    "A loop whose length depends on the data counts once.",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one device holds of a model and a batch."""

    config: Config
    streams: StreamSpec
    mesh: Mapping[str, int]
    attention: str  # the backend that computes it

    def parts(self, axis: str) -> int:
        """Devices over which a logical axis is spread."""
        return math.prod(self.mesh.get(name, 1) for name in mesh_axes(axis))

    @property
    def devices(self) -> int:
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
        """Streams for which the head is computed: all devices of the stream axis run the same program."""
        size = self.streams_per_device
        kept = sum(any(self.streams.loss_weights[s::size]) for s in range(size))
        return kept * self.parts("stream")

    @property
    def head_cells(self) -> float:
        """Cells of one micro-batch on one device for which the head is computed."""
        return self.tables * self.config.data.rows * self.head_streams / self.parts("stream")

    @property
    def item(self) -> int:
        """Bytes of a value in the compute dtype."""
        return 2 if self.config.model.compute_dtype == "bfloat16" else 4

    @property
    def layer_weights(self) -> float:
        """Values of one layer's matrices after they are gathered."""
        model = self.config.model
        attention = (
            model.d_model
            * (2 * model.num_heads + 2 * model.num_kv_heads)
            * model.head_dim
            / self.parts("heads")
        )
        return attention + 3 * model.d_model * model.d_ff / self.parts("mlp")

    @property
    def table(self) -> float:
        """Values of the embedding (or the head) on one device when d_model is gathered."""
        return self.config.model.vocab_size * self.config.model.d_model / self.parts("vocab")


def flops(shape: Shape) -> dict[str, float]:
    """FLOPs of a step on one device: `useful`, what is added by each kind of extra work, and `hardware`, their sum."""
    model, data, streams = shape.config.model, shape.config.data, shape.streams
    rows = data.batch_size * data.rows
    absent = shape.streams_per_device * shape.parts("stream") - streams.size
    pairs = data.batch_size * visible_pairs(streams.lag_array, data.rows)
    attention = (
        4 * model.num_heads * model.head_dim * pairs
    )  # forward: scores, and their product with the values
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    up_to_down = (
        2 * rows * model.d_model * (heads + 2 * model.d_ff)
    )  # of one stream, without the MLP's last product
    forward = up_to_down + 2 * rows * model.d_model * model.d_ff
    head = 2 * rows * model.d_model * model.vocab_size  # of one stream, forward
    trained = sum(weight > 0 for weight in streams.loss_weights)
    full = model.remat in INPUT_ONLY
    again = {"reference": 0, "splash": 3}.get(
        shape.attention, 1
    )  # products as large as that of the scores
    total = {
        "useful": train_flops(model, streams, data.batch_size, data.rows),
        "remat": model.num_layers * (streams.size * up_to_down + attention) if full else 0,
        "attention_scores_again": again * model.num_layers * attention // 2,
        "logits_again": shape.head_streams * head if shape.config.loss.vocab_chunks > 1 else 0,
        "head_without_weight": 3 * (shape.head_streams - trained) * head,
        "absent_streams": absent * model.num_layers * (3 * forward + (up_to_down if full else 0)),
    }
    result = {name: value / shape.devices for name, value in total.items()}
    return {**result, "hardware": sum(result.values())}


def _layer_values(shape: Shape) -> float:
    """Values that the products of one layer read and write per cell on one device, norms included."""
    model = shape.config.model
    q, kv = (
        n * model.head_dim / shape.parts("heads") for n in (model.num_heads, 2 * model.num_kv_heads)
    )
    f, d = model.d_ff / shape.parts("mlp"), model.d_model
    norms, projections, attention, out, up, down = (
        4 * d,
        d + q + kv,
        2 * q + kv,
        q + d,
        d + 2 * f,
        3 * f + d,
    )
    return norms + projections + attention + out + up + down


def hbm_bytes(shape: Shape, state_bytes: float) -> dict[str, float]:
    """Bytes that a step moves between memory and the cores of one device. `state_bytes`: parameters and moments."""
    config, item, micro = shape.config, shape.item, shape.config.optim.accumulate
    again = config.model.remat in INPUT_ONLY
    chunks = math.ceil(shape.head_cells / min(config.loss.chunk_tokens, shape.head_cells))
    vocab, parts = config.model.vocab_size / shape.parts("vocab"), config.loss.vocab_chunks
    logits, table = 4 * 4 + item, 3 * item + 8  # bytes moved for each value of them
    head = shape.head_cells * vocab * logits + chunks * shape.table * table
    if (
        parts > 1
    ):  # logits once more, and for each part the hidden states twice and their gradient in float32
        head += shape.head_cells * vocab * 8 + chunks * shape.table * item
        head += parts * shape.head_cells * config.model.d_model * (2 * item + 8)
    return {
        "state": 2 * state_bytes
        + 2 * micro * state_bytes / 3,  # a third of it is parameters, as many gradients
        "weights": micro * config.model.num_layers * (6 + 2 * again) * shape.layer_weights * item,
        "activations": micro
        * config.model.num_layers
        * (3 + again)
        * _layer_values(shape)
        * shape.cells
        * item,
        "head": micro * head,
    }


def host_bytes(shape: Shape) -> float:
    """Bytes that a step of remat=offload moves from one device to the host's memory, and as many back."""
    model = shape.config.model
    kept = (
        model.num_layers * shape.cells * model.d_model * shape.item * shape.config.optim.accumulate
    )
    return kept if model.remat == "offload" else 0


def memory_parts(shape: Shape, state_bytes: float) -> dict[str, float]:
    """Where memory goes by formula, in bytes: not exact, but it says what to change first."""
    config, model, item = shape.config, shape.config.model, shape.item
    q, kv = (
        n * model.head_dim / shape.parts("heads") for n in (model.num_heads, 2 * model.num_kv_heads)
    )
    f = model.d_ff / shape.parts("mlp")
    kept = (
        {
            "offload": 0,
            "full": model.d_model,
            "dots": 2 * model.d_model + 2 * q + kv + 2 * f,
            "none": _layer_values(shape),
        }[model.remat]
        * shape.cells
        * item
    )
    vocab, head_parts = model.vocab_size / shape.parts("vocab"), config.loss.vocab_chunks
    gathered_keys = (
        2 * shape.cells * shape.parts("stream") * kv * item
    )  # and values, and gradients of both
    if model.kv_ring:  # those of two devices, the gradients in float32
        gathered_keys = 2 * shape.cells * kv * (item + 4)

    # Of all layers if nothing is computed again.
    def layers(count):
        return model.num_layers if model.remat == "none" else count

    return {
        "state": state_bytes,
        "gradients": state_bytes / 3,
        "kept_activations": model.num_layers * kept,
        "one_layer": _layer_values(shape) * shape.cells * item,
        "gathered_keys": (1 if model.kv_parts > 1 else layers(1)) * gathered_keys / model.kv_parts,
        "gathered_weights": layers(2)
        * shape.layer_weights
        * item,  # those in use, and those on their way
        "logits": min(config.loss.chunk_tokens, shape.head_cells) * vocab / head_parts * (8 + item),
        # Gathered, its gradient in float32, and that in the compute dtype on its way; the rows of the embedding.
        "tables": shape.table / head_parts * (2 * item + 4)
        + shape.cells * model.d_model * (2 * item + 4),
    }


REMEDIES = {
    "state": "more devices along mesh.fsdp (or mesh.stream): state is spread over them",
    "gradients": "more devices along mesh.fsdp (or mesh.stream): gradients are spread over them",
    "kept_activations": "config.model.remat='full', or 'offload', which keeps them in the host's memory",
    "one_layer": "fewer tables a device: a smaller data.batch_size or a larger optim.accumulate",
    "gathered_keys": "a larger config.model.kv_parts: keys and values are gathered in so many parts; or config.model.kv_ring",
    "gathered_weights": "more devices along mesh.tensor: it divides heads and ffn",
    "logits": "a smaller config.loss.chunk_tokens",
    "tables": "a larger config.loss.vocab_chunks: the head is gathered in so many parts",
}


def remedies(shape: Shape, state_bytes: float) -> list[str]:
    """What to change, that of the largest part first."""
    parts = memory_parts(shape, state_bytes)
    named, remat = dict(REMEDIES), shape.config.model.remat
    if remat == "full":
        named["kept_activations"] = (
            "config.model.remat='offload': layer inputs wait in the host's memory"
        )
    if shape.config.model.kv_ring:
        named["gathered_keys"] = named["one_layer"]
    if remat == "none":
        named["gathered_weights"] = named["kept_activations"]
    lines: dict[str, str] = {}
    for part in sorted(parts, key=parts.get, reverse=True):
        lines.setdefault(
            named[part], f"{named[part]} ({part}: {parts[part] / 2**30:.2f} GiB by formula)"
        )
    return list(lines.values())[:3]


def transfer_seconds(collective: Collective, devices: Sequence, hardware: Hardware) -> float:
    """Seconds of all executions of a collective on its network; nan where the hardware's figure is not known.

    `devices`: of the mesh, in its order.
    """
    group = [devices[i] for i in collective.groups[0]]
    size = len({device.slice_index for device in group}) if collective.dcn else len(group)
    around = (size - 1) / size * collective.bytes
    if collective.dcn:
        moved = {"all-reduce": 2 * around, "collective-permute": collective.bytes}.get(
            collective.kind, around
        )
        return moved * collective.count / (hardware.dcn_bandwidth or math.nan)
    link = hardware.ici_bandwidth or math.nan
    if collective.kind == "collective-permute":
        return collective.bytes * collective.count / link
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        rings = [
            n
            for n in (len(set(places)) for places in zip(*(device.coords for device in group)))
            if n > 1
        ] or [1]
        # A quarter of a ring is the mean way of what goes the shorter way round; each ring has two links.
        return collective.bytes * sum(rings) / 4 / (2 * len(rings)) * collective.count / link
    return (2 * around if collective.kind == "all-reduce" else around) / 2 * collective.count / link


def estimate(
    shape: Shape,
    state_bytes: float,
    collectives: Sequence[Collective],
    devices: Sequence,
    hardware: Hardware,
):
    """Times in seconds, MFU and arithmetic intensity of a step, as a dict that goes into JSON."""
    work, traffic = flops(shape), hbm_bytes(shape, state_bytes)
    compute, hbm = work["hardware"] / hardware.flops, sum(traffic.values()) / hardware.hbm_bandwidth
    networks: dict[str, dict[str, float]] = {}
    for collective in collectives:
        axes = "+".join(axes_of(collective.groups, shape.mesh)) or "none"
        network = networks.setdefault(
            "DCN" if collective.dcn else f"ICI {axes}", {"asynchronous": 0.0, "synchronous": 0.0}
        )
        kind = "asynchronous" if collective.asynchronous else "synchronous"
        network[kind] += transfer_seconds(collective, devices, hardware)
    hidden = [network["asynchronous"] for network in networks.values()]
    exposed = sum(network["synchronous"] for network in networks.values())
    links = [sum(network.values()) for network in networks.values()]

    def longest(*times):
        return float(np.max(times))  # keeps nan, where a figure of the hardware is not known

    seconds = longest(compute, hbm, *hidden) + exposed

    def mfu(t):
        return work["useful"] / hardware.flops / t

    return {
        "flops": work,
        "hbm_bytes": {**traffic, "total": sum(traffic.values())},
        "host_bytes": host_bytes(shape),
        "arithmetic_intensity": work["hardware"] / sum(traffic.values()),
        "intensity_of_the_hardware": hardware.flops / hardware.hbm_bandwidth,
        "compute_seconds": compute,
        "hbm_seconds": hbm,
        "network_seconds": networks,
        "step_seconds": seconds,
        "step_seconds_bounds": [longest(compute, hbm, *links), compute + hbm + sum(links)],
        "mfu": mfu(seconds),
        "mfu_bounds": [mfu(compute + hbm + sum(links)), mfu(longest(compute, hbm, *links))],
        "tokens_per_second_and_device": shape.cells * shape.config.optim.accumulate / seconds,
    }
