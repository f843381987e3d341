"""Figures of accelerators and of the links between them, each with its source; clusters by name."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

GB, GIB = 1e9, 2**30

# Dense BF16 matrix peak in FLOP/s, by the start of the device kind that JAX reports.
PEAK_BF16_FLOPS: dict[str, float] = {
    "NVIDIA H100": 989e12,  # NVIDIA H100 SXM datasheet; the paper's figure for the H800
    "NVIDIA H200": 989e12,  # NVIDIA H200 SXM datasheet
    "NVIDIA H800": 989e12,
    "NVIDIA A100": 312e12,  # NVIDIA A100 datasheet
    "NVIDIA GB200": 2500e12,  # NVIDIA GB200 NVL72 datasheet, dense, one of its GPUs
    "NVIDIA B200": 2250e12,  # NVIDIA B200 datasheet, dense
    "TPU v4": 275e12,  # Google Cloud TPU system pages, this and the next
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # half a chip, which is what JAX calls a device
}


def peak_flops(device_kind: str) -> float | None:
    """Dense BF16 FLOP/s of a device kind; None where the figure is not known (a CPU, say)."""
    for name, peak in PEAK_BF16_FLOPS.items():
        if device_kind.startswith(name):
            return peak
    return None


@dataclass(frozen=True)
class Link:
    """One device's share of a network, in one direction."""

    bandwidth: float  # bytes/s
    latency: float  # seconds until a small message has arrived


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device, and the two networks it is on: inside its node, and between nodes."""

    kind: str  # the start of what JAX reports
    platform: Literal["gpu", "tpu", "cpu"]
    flops_bf16: float  # dense FLOP/s
    flops_fp8: float
    memory: int  # bytes that a program can use
    memory_bandwidth: float  # bytes/s
    node: int  # devices that the inner links join
    inner: Link
    outer: Link
    torus: int = 0  # dimensions of a TPU's torus
    devices_per_chip: int = 1


# GPUs: NVIDIA datasheets; memory is what a program was seen to get. Links at nominal bandwidth:
# NVLink 4 is 900 GB/s in both directions together, cut to 400 in the H800; a NIC has 400 Gbit/s. Of
# the H800's 200 and 50 GB/s 160 and 40 are usable, which cost.Reached.network stands for; these and
# the latencies of 64 bytes are those of the paper (ISCA, sections 2.3 and 4.1, table 5). Between
# nodes a message waits as long as the switches on its way say, on the fat trees of
# network/groups.py.
# TPUs: Google Cloud TPU system pages (v5p, v6e, tpu7x). A chip's bidirectional bandwidth is halved
# for one direction, and a collective along one mesh axis is given one dimension of the torus:
# bandwidth / dimensions. Their data-centre network joins pods (50 or 100 Gbit/s a chip).
_NVLINK = Link(450 * GB, 3.33e-6)
_INFINIBAND = Link(50 * GB, 3.7e-6)
ACCELERATORS: dict[str, Accelerator] = {
    "h800": Accelerator(
        kind="NVIDIA H800", platform="gpu", flops_bf16=989e12, flops_fp8=1979e12,
        memory=79 * GIB, memory_bandwidth=3350 * GB, node=8,
        inner=Link(200 * GB, 3.33e-6), outer=_INFINIBAND,
    ),
    "h100": Accelerator(
        kind="NVIDIA H100", platform="gpu", flops_bf16=989e12, flops_fp8=1979e12,
        memory=78 * GIB, memory_bandwidth=3350 * GB, node=8, inner=_NVLINK, outer=_INFINIBAND,
    ),
    "h200": Accelerator(
        kind="NVIDIA H200", platform="gpu", flops_bf16=989e12, flops_fp8=1979e12,
        memory=139 * GIB, memory_bandwidth=4800 * GB, node=8, inner=_NVLINK, outer=_INFINIBAND,
    ),
    "gb200": Accelerator(
        kind="NVIDIA GB200", platform="gpu", flops_bf16=2500e12, flops_fp8=5000e12,
        memory=182 * GIB, memory_bandwidth=8000 * GB, node=72,
        inner=Link(900 * GB, 3.33e-6), outer=_INFINIBAND,
    ),
    "v5p": Accelerator(
        kind="TPU v5", platform="tpu", flops_bf16=459e12, flops_fp8=459e12,
        memory=95 * GIB, memory_bandwidth=2765 * GB, node=8960,
        inner=Link(200 * GB, 1e-6), outer=Link(6.25 * GB, 20e-6), torus=3,
    ),
    "v6e": Accelerator(
        kind="TPU v6 lite", platform="tpu", flops_bf16=918e12, flops_fp8=918e12,
        memory=31 * GIB, memory_bandwidth=1638 * GB, node=256,
        inner=Link(200 * GB, 1e-6), outer=Link(12.5 * GB, 20e-6), torus=2,
    ),
    "tpu7x": Accelerator(
        kind="TPU7x", platform="tpu", flops_bf16=1153.5e12, flops_fp8=2307e12,
        memory=95 * GIB, memory_bandwidth=3690 * GB, node=18432,
        inner=Link(100 * GB, 1e-6), outer=Link(6.25 * GB, 20e-6), torus=3, devices_per_chip=2,
    ),
    # Devices of one process that share two cores and their memory: for plans of small models that
    # can also be run. Round figures of a laptop, divided among eight such devices.
    "cpu": Accelerator(
        kind="cpu", platform="cpu", flops_bf16=10e9, flops_fp8=10e9,
        memory=2 * GIB, memory_bandwidth=2 * GB, node=8,
        inner=Link(0.5 * GB, 50e-6), outer=Link(0.5 * GB, 50e-6),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """So many equal devices; those of a node are neighbours in the order of the mesh."""

    name: str
    accelerator: Accelerator
    devices: int


# Of a cluster. Networks of more, pair by pair of their nodes, fill the memory of a laptop.
MOST_DEVICES = 32768


def cluster(name: str) -> Cluster:
    """The cluster of a name such as h200x2048: an accelerator and how many.

    Raises:
      ValueError: the name is not of that form, or its accelerator is not known.
    """
    match = re.fullmatch(r"(.+)x(\d+)", name.lower())
    if match is None:
        raise ValueError(
            f"cluster {name!r} must be ACCELERATORxDEVICES, such as h200x2048 or v5px256: "
            f"the accelerators are {', '.join(ACCELERATORS)}"
        )
    kind, devices = match[1].replace("-", "").replace("tpuv", "v"), int(match[2])
    if kind not in ACCELERATORS:
        near = difflib.get_close_matches(kind, ACCELERATORS, n=1)
        hint = f"did you mean {near[0]}x{devices}? " if near else ""
        raise ValueError(
            f"unknown accelerator {kind!r} in cluster {name!r}: {hint}"
            f"({', '.join(ACCELERATORS)})"
        )
    chip = ACCELERATORS[kind].devices_per_chip
    if devices < 1 or devices % chip:
        raise ValueError(f"cluster {name!r} needs a multiple of {chip} devices, not {devices}")
    if devices > MOST_DEVICES:
        raise ValueError(f"cluster {name!r} must have at most {MOST_DEVICES} devices")
    return Cluster(name=f"{kind}x{devices}", accelerator=ACCELERATORS[kind], devices=devices)
