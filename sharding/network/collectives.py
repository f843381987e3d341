"""Collective operations timed on a cluster: what crosses which wire, and how long that takes.

Seconds are those of the slower of network and NVLink, which work at the same time, and the
latency of one message between the GPUs farthest apart.
"""

from dataclasses import dataclass

import numpy as np

from sharding.network.cluster import Cluster
from sharding.network.flows import Routes, finish_seconds
from sharding.network.latency import NVLINK
from sharding.network.routing import Policy, route


@dataclass(frozen=True)
class Timing:
    """Seconds of a collective operation, and where they come from."""

    network: float
    nvlink: float
    latency: float
    bytes_per_gpu: float  # what each GPU holds before or after, as benchmarks count it

    @property
    def seconds(self) -> float:
        return max(self.network, self.nvlink) + self.latency

    @property
    def rate(self) -> float:
        """Algorithm bandwidth: the bytes of a GPU over the seconds."""
        return self.bytes_per_gpu / self.seconds


def all_to_all(
    cluster: Cluster, message_bytes: float, *, policy: Policy = "adaptive", pxn: bool = True,
    parts: int = 1, seed: int = 0,
) -> Timing:  # fmt: skip
    """Every GPU sends a message to every GPU.

    With PXN a message goes to the GPU of the target's number first, over NVLink, and leaves by
    that NIC; without, it leaves by its own GPU's NIC, straight to the target's where the network
    joins the two, else to the one of its own number, which hands it on.
    """
    M, G = cluster.num_nodes, cluster.node.gpus
    if pxn:
        routes = exchange(cluster, np.full((M, M, G), G * message_bytes), policy, parts, seed)
        handed_on = np.ones((G, G), bool)
    else:
        routes, handed_on = _straight(cluster, message_bytes, policy, parts, seed)
    np.fill_diagonal(handed_on, False)
    # Inside a node every message to another number takes NVLink; to other nodes, those handed on.
    copies = G - 1 + (M - 1) * int(handed_on.sum()) / G
    return Timing(
        network=finish_seconds(routes, cluster.capacity_L),
        nvlink=copies * message_bytes / cluster.node.nvlink_rate,
        latency=cluster.latency(straight=not handed_on.any()),
        bytes_per_gpu=M * G * message_bytes,
    )


def _straight(cluster, message_bytes, policy, parts, seed) -> tuple[Routes, np.ndarray]:
    """Routes from NIC to NIC, and which pairs of numbers need a GPU in between; [G, G]."""
    M, G = cluster.num_nodes, cluster.node.gpus
    part_I = cluster.part_MI[0]
    handed_on = part_I[:, None] != part_I[None]
    a, b, i, j = (x.ravel() for x in np.indices((M, M, G, G)))
    apart = a != b
    a, b, i, j = a[apart], b[apart], i[apart], j[apart]
    source_F = cluster.endpoint_MI[a, i]
    target_F = cluster.endpoint_MI[b, np.where(handed_on[i, j], i, j)]
    bytes_F = np.full(len(source_F), float(message_bytes))
    routes = route(cluster.topology, source_F, target_F, bytes_F, policy, parts=parts, seed=seed)
    return routes, handed_on


def exchange(
    cluster: Cluster, bytes_MMI: np.ndarray, policy: Policy, parts: int = 1, seed: int = 0,
) -> Routes:  # fmt: skip
    """Routes of what nodes send to nodes through NIC i of both; the diagonal stays at home.

    Where NIC i of the two nodes is cut off, all pairs of NICs that are not share its bytes, and
    NVLink, whose time for that is not counted, brings them where they belong.

    Raises:
      ValueError: two nodes with no path between them at all.
    """
    part_MI = cluster.part_MI
    M, G = part_MI.shape
    source, target, moved = [], [], []
    for i in range(G):
        a, b = np.nonzero(bytes_MMI[..., i] * (1 - np.eye(M)))
        joined = (part_MI[a, i] == part_MI[b, i]) & (part_MI[a, i] >= 0)
        source.append(cluster.endpoint_MI[a[joined], i])
        target.append(cluster.endpoint_MI[b[joined], i])
        moved.append(bytes_MMI[a[joined], b[joined], i])
        # Few: what failures leave without its own way.
        for m, n in zip(a[~joined], b[~joined], strict=True):
            others = np.flatnonzero((part_MI[m] == part_MI[n]) & (part_MI[m] >= 0))
            if not len(others):
                raise ValueError(f"node {m} and node {n} are cut off from each other")
            source.append(cluster.endpoint_MI[m, others])
            target.append(cluster.endpoint_MI[n, others])
            moved.append(np.full(len(others), bytes_MMI[m, n, i] / len(others)))
    ends = [np.concatenate(x).astype(np.int32) for x in (source, target)]
    return route(cluster.topology, *ends, np.concatenate(moved), policy, parts=parts, seed=seed)


def ring(
    cluster: Cluster, size_bytes: float, *, policy: Policy = "adaptive", order_M=None,
    parts: int = 1, seed: int = 0,
) -> Timing:  # fmt: skip
    """All-gather or reduce-scatter of `size_bytes` in rings through all nodes, one for each NIC.

    Both send (n - 1) / n of the size, in opposite directions, so they take the same time. Ring
    i enters and leaves every node by NIC i; inside a node it passes from GPU to GPU. On one node it
    closes there.
    """
    G, n = cluster.node.gpus, cluster.num_gpus
    routes = ring_routes(cluster, size_bytes, policy, order_M, parts, seed)
    hop_bytes = size_bytes / G * (n - 1) / n
    # A piece passes through all GPUs but one: from node to node, and inside nodes.
    between = cluster.node.link.of(cluster.hops() + 1)
    M = cluster.num_nodes
    # Of the G rings through a GPU one leaves the node there.
    handed_on = G - 1 if M > 1 else G
    return Timing(
        network=finish_seconds(routes, cluster.capacity_L),
        nvlink=handed_on * hop_bytes / cluster.node.nvlink_rate,
        latency=(M - 1) * between + (n - M) * NVLINK.same_leaf,
        bytes_per_gpu=size_bytes,
    )


def ring_routes(cluster, size_bytes, policy, order_M=None, parts=1, seed=0) -> Routes:
    """Routes of the rings: from NIC i of a node to NIC i of the next in the order."""
    G, n, M = cluster.node.gpus, cluster.num_gpus, cluster.num_nodes
    order_M = np.arange(M) if order_M is None else np.asarray(order_M)
    bytes_MMI = np.zeros((M, M, G))
    bytes_MMI[order_M, np.roll(order_M, -1)] = size_bytes / G * (n - 1) / n
    return exchange(cluster, bytes_MMI, policy, parts, seed)
