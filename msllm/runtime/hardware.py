"""Peak figures of accelerators, by `device_kind`, with their sources.

All figures are for one device as `jax.devices()` counts them: a chip, but half a chip on TPU7x.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Peaks of one device. None: not published, or the device has no such thing."""

    flops: float  # dense bfloat16 products, FLOP/s, no sparsity
    hbm_gib: float  # TPU: what XLA lets a program use; GPU: capacity
    hbm_bandwidth: float  # bytes/s
    ici_links: int | None = None  # links to neighbours in the torus
    ici_bandwidth: float | None = None  # bytes/s of one link, one way
    dcn_bandwidth: float | None = None  # bytes/s to other slices


# TPU: https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, tables of key specifications.
# They give the ICI bandwidth of all links in both directions. Here it is divided by links and
# directions. `hbm_gib` is what the compiler reports when a program does not fit ("exceeds available
# HBM (15.75G)"; libtpu 0.0.42 and 0.0.52).
_V5E = Hardware(197e12, 15.75, 819e9, 4, 50e9, 6.4e12 / 8 / 256)  # DCN: 6.4 Tbps for a pod of 256
_V6E = Hardware(918e12, 31.24, 1638e9, 4, 100e9, 100e9 / 8)  # DCN: 100 Gbps a chip
TABLE: dict[str, Hardware] = {
    # ICI: 6 links of 50 GB/s (Jouppi et al. 2023, arXiv 2304.01433, table 4). Both cores are one
    # device (megacore).
    "TPU v4": Hardware(275e12, 30.75, 1200e9, 6, 50e9, None),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": Hardware(459e12, 95.73, 2765e9, 6, 100e9, 50e9 / 8),  # v5p; DCN: 50 Gbps a chip
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    # A chip is two devices, each with half of 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s of ICI
    # and 100 Gbps of DCN.
    "TPU7x": Hardware(1153.5e12, 94.74, 3690e9, 6, 50e9, 50e9 / 8),
    # https://www.nvidia.com/en-us/data-center/a100/, specifications
    "NVIDIA A100-SXM4-40GB": Hardware(312e12, 40.0, 1555e9),
    "NVIDIA A100": Hardware(312e12, 80.0, 2039e9),
    # https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306 (with sparsity: halved)
    "NVIDIA H100 PCIe": Hardware(756.5e12, 80.0, 2000e9),
    "NVIDIA H100": Hardware(989.5e12, 80.0, 3350e9),
    # https://www.nvidia.com/en-us/data-center/h200/ (with sparsity: halved)
    "NVIDIA H200": Hardware(989.5e12, 141.0, 4800e9),
    # https://www.nvidia.com/en-us/data-center/dgx-b200/: an eighth of 36 PFLOP/s (with sparsity:
    # halved), 1440 GB, 64 TB/s
    "NVIDIA B200": Hardware(2250e12, 180.0, 8000e9),
}


def lookup(device_kind: str) -> Hardware | None:
    """The entry whose name is the longest prefix of a device kind; None if there is none."""
    names = [name for name in TABLE if device_kind.startswith(name)]
    return TABLE[max(names, key=len)] if names else None
