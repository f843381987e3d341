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
    cluster: Cluster, message_bytes: float, *, policy: Policy = "adaptive", parts: int = 1,
    seed: int = 0,
) -> Timing:  # fmt: skip
    """Every GPU sends a message to every GPU."""
    M, G = cluster.num_nodes, cluster.node.gpus
    routes = exchange(cluster, np.full((M, M, G), G * message_bytes), policy, parts, seed)
    return Timing(
        network=finish_seconds(routes, cluster.capacity_L),
        # Of what a GPU sends, all but its own number's share goes to GPUs of its node.
        nvlink=M * (G - 1) * message_bytes / cluster.node.nvlink_rate,
        latency=cluster.latency(),
        bytes_per_gpu=M * G * message_bytes,
    )


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
    i enters and leaves every node by NIC i; inside a node it passes from GPU to GPU.
    """
    G, n = cluster.node.gpus, cluster.num_gpus
    routes = ring_routes(cluster, size_bytes, policy, order_M, parts, seed)
    hop_bytes = size_bytes / G * (n - 1) / n
    # A piece passes through all GPUs but one: from node to node, and inside nodes.
    between = cluster.node.link.of(cluster.hops() + 1)
    M = cluster.num_nodes
    return Timing(
        network=finish_seconds(routes, cluster.capacity_L),
        nvlink=(G - 1) * hop_bytes / cluster.node.nvlink_rate,
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
