"""What a step computes, moves and waits for on given hardware.

A step is a list of Work (operations and memory traffic) and of Transfers (collectives over mesh
axes), both for one device. Seconds are those terms at the hardware's figures, each divided by the
part of the figure that is reached in practice. Transfers that nothing waits for run behind the
work; the others, and what the work is too short to hide, are exposed.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sharding.hardware import Accelerator
from sharding.mesh import AXES, all_axes
from sharding.network import groups
from sharding.network.latency import INFINIBAND

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]


class Work(NamedTuple):
    """Operations of a part of the step on one device."""

    part: str
    flops_bf16: float = 0.0
    flops_fp8: float = 0.0
    flops_core: float = 0.0  # of attention, in BF16 too: between its products stands the softmax
    bytes: float = 0.0  # read and written in memory beside what products read


class Transfer(NamedTuple):
    """Equal collectives over the devices that differ in `axes` only."""

    part: str
    kind: Kind
    axes: tuple[str, ...]
    bytes: float  # of the gathered, summed or exchanged array on a device, all times together
    times: int
    hidden: bool  # whether other work can go on meanwhile
    # Devices that take part, and how many of them share a node, where those are not all of the
    # axes: a hop of dispatch.
    group: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reached:
    """How much of the hardware's figures programs reach; `overhead` is seconds of a step.

    Those of work are of the peer-sized step of 4 x 4096 tokens on one H200 (2026-11-30, jax
    0.11.2). In its profile in FP8 our FP8 products took 55.8 ms, 0.48 of the peak for all blocks
    of rows, and attention 16.5 ms, 0.38 of it. With that, the nearest to its times in BF16 with
    other micro-batches and remat policies (twelve, within 3 %) is 0.74 of the peak of products and
    0.69 of the bandwidth, gaps between kernels included: large copies alone reach 0.89, large
    products 0.76.
    That of the network is not measured: 160 of 200 and 40 of 50 GB/s, what the paper can use of an
    H800's links.
    """

    products: float = 0.74
    fp8: float = 0.48
    core: float = 0.38
    memory: float = 0.69
    network: float = 0.8
    message: float = 1.0  # times the latency of the link
    overhead: float = 0.0
    overlap: float = 0.9  # of the work that transfers can hide behind


class Terms(NamedTuple):
    """Seconds of one device at the hardware's own figures, by what limits them."""

    products: float = 0.0
    fp8: float = 0.0
    core: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    messages: float = 0.0

    def __add__(self, other):
        return Terms(*(a + b for a, b in zip(self, other, strict=True)))

    def at(self, reached: Reached) -> float:
        """Seconds in practice."""
        return (
            self.products / reached.products
            + self.fp8 / reached.fp8
            + self.core / reached.core
            + self.memory / reached.memory
            + self.network / reached.network
            + self.messages * reached.message
        )


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, and of its parts; `exposed` is communication that work does not hide."""

    seconds: float
    work: float
    communication: float
    exposed: float
    work_by_part: Mapping[str, float]
    communication_by_part: Mapping[str, float]


def group_size(transfer: Transfer, mesh: Mapping[str, int]) -> int:
    """Devices in a collective."""
    if transfer.group is not None:
        return transfer.group[0]
    return math.prod(mesh.get(axis, 1) for axis in transfer.axes)


def members_in_node(axes: Sequence[str], mesh: Mapping[str, int], node: int) -> int:
    """How many devices of a collective's group share a node; the last mesh axis is the closest.

    Nodes are runs of `node` neighbours in the order of the mesh, so this counts the members
    whose distance from the first is less than a node.
    """
    return _members_in_node(tuple(axes), tuple(all_axes(mesh).values()), node)


def _dimensions(transfer: Transfer, mesh: Mapping[str, int]) -> list[tuple[int, bool]]:
    """Sizes of the mesh in its order, and whether the devices of a group differ there."""
    found = [(size, axis in transfer.axes) for axis, size in all_axes(mesh).items()]
    if transfer.group is not None and transfer.group[1] == 1:
        # The hop between nodes: members are as far apart as a node has ranks of the axis.
        place, size = AXES.index(transfer.axes[0]), transfer.group[0]
        found[place : place + 1] = [(size, True), (found[place][0] // size, False)]
    return found


@functools.cache
def _members_in_node(axes: tuple[str, ...], sizes: tuple[int, ...], node: int) -> int:
    members, stride = [0], 1
    for axis, size in zip(reversed(AXES), reversed(sizes), strict=True):
        if axis in axes:
            members = [m + stride * i for m in members for i in range(size)]
        stride *= size
    return sum(member < node for member in members)


def sent_bytes(kind: Kind, num_bytes: float, group: int) -> float:
    """Bytes that leave a device: a ring for sums and gathers, all but its own part of an exchange.

    `num_bytes` is the gathered array of an all-gather, the unsummed array of the two sums, the
    array that an all-to-all exchanges.
    """
    if kind == "collective-permute":
        return num_bytes  # each device sends all that it passes on
    passes = 2 if kind == "all-reduce" else 1
    return passes * num_bytes * (group - 1) / group


def work_terms(work: Work, hardware: Accelerator) -> Terms:
    """The work at peak; FP8 products run at the FP8 peak."""
    return Terms(
        products=work.flops_bf16 / hardware.flops_bf16,
        fp8=work.flops_fp8 / hardware.flops_fp8,
        core=work.flops_core / hardware.flops_bf16,
        memory=work.bytes / hardware.memory_bandwidth,
    )


def transfer_terms(transfer: Transfer, mesh: Mapping[str, int], hardware: Accelerator) -> Terms:
    """The transfer at the speed of the slower of the two networks that it crosses.

    Between nodes of GPUs that is the time of all its groups together on a fat tree for each NIC of
    a node (network.groups). Elsewhere every byte of a ring crosses a node's boundary once, and the
    devices of the node share that; in an exchange each device sends its own parts itself.
    """
    group = group_size(transfer, mesh)
    if group == 1:
        return Terms()
    if hardware.platform == "cpu":
        # Devices of one process, which scatter no sums: they meet and copy in its memory.
        kind = transfer.kind.replace("reduce-scatter", "all-reduce")
        network = sent_bytes(kind, transfer.bytes, group) / hardware.inner.bandwidth
        return Terms(network=network, messages=transfer.times * hardware.inner.latency)
    if transfer.group is not None:
        inside = transfer.group[1]
    else:
        inside = members_in_node(transfer.axes, mesh, hardware.node)
    if transfer.kind == "all-to-all":
        inner = transfer.bytes * (inside - 1) / group
        outer = transfer.bytes * (group - inside) / group
    else:
        sent = sent_bytes(transfer.kind, transfer.bytes, group)
        inner = sent if inside > 1 else 0.0
        outer = sent / inside if group > inside else 0.0
    link = hardware.outer if group > inside else hardware.inner
    crossing, latency = outer / link.bandwidth, link.latency
    if group > inside and hardware.platform == "gpu":
        found = groups.crossing(
            _dimensions(transfer, mesh), hardware.node, link.bandwidth,
            ring=transfer.kind != "all-to-all",
        )  # fmt: skip
        crossing = sent_bytes(transfer.kind, transfer.bytes, group) * found.seconds
        latency = INFINIBAND.of(found.switches)
    hops = math.ceil(math.log2(group)) * (2 if transfer.kind == "all-reduce" else 1)
    return Terms(
        network=max(inner / hardware.inner.bandwidth, crossing),
        messages=transfer.times * hops * latency,
    )


def predict(
    work: Sequence[Work],
    transfers: Sequence[Transfer],
    mesh: Mapping[str, int],
    hardware: Accelerator,
    reached: Reached,
) -> Prediction:
    """Seconds of a step: its work, and the communication that the work does not hide."""
    work_by_part: dict[str, float] = {}
    for item in work:
        seconds = work_terms(item, hardware).at(reached)
        work_by_part[item.part] = work_by_part.get(item.part, 0.0) + seconds
    communication: dict[str, float] = {}
    hidden = 0.0
    for item in transfers:
        seconds = transfer_terms(item, mesh, hardware).at(reached)
        communication[item.part] = communication.get(item.part, 0.0) + seconds
        hidden += seconds if item.hidden else 0.0
    busy, sending = sum(work_by_part.values()), sum(communication.values())
    exposed = sending - hidden + max(0.0, hidden - reached.overlap * busy)
    return Prediction(
        seconds=busy + exposed + reached.overhead,
        work=busy,
        communication=sending,
        exposed=exposed,
        work_by_part=work_by_part,
        communication_by_part=communication,
    )
