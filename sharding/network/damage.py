"""What is lost when a part of a network breaks: endpoints, pairs of nodes, bandwidth."""

from dataclasses import dataclass

import numpy as np

from sharding.network.cluster import Cluster
from sharding.network.collectives import exchange
from sharding.network.flows import load
from sharding.network.routing import Policy
from sharding.network.topology import Topology


@dataclass(frozen=True)
class Damage:
    """What is left of a cluster after parts of it broke."""

    cut_off: int  # NICs with no way to another node
    nodes_apart: int  # pairs of nodes that no longer reach each other
    slowdown: float  # of an all-to-all's busiest link, infinite when nodes are apart
    longer: int | None  # hops that the longest path between nodes gained, none when they are apart


def damage(cluster: Cluster, *, policy: Policy = "adaptive", **broken) -> Damage:
    """Compares the cluster with itself when `switches`, `cables` or `endpoints` are broken."""
    after = cluster.without(**broken)
    part_MI = after.part_MI
    alone_MI = np.array(
        [[part < 0 or np.count_nonzero(column == part) < 2 for part in column]
         for column in part_MI.T]
    ).T  # fmt: skip
    joined_MM = ((part_MI[:, None] == part_MI[None]) & (part_MI[:, None] >= 0)).any(2)
    apart = int((~joined_MM).sum() - (~joined_MM).diagonal().sum()) // 2
    seconds = [_busiest(c, policy) for c in (cluster, after)] if not apart else [1.0, np.inf]
    return Damage(
        cut_off=int(alone_MI.sum()),
        nodes_apart=apart,
        # Where nothing is sent, as by a single node, nothing is slower.
        slowdown=seconds[1] / seconds[0] if seconds[0] else 1.0,
        longer=None if apart else after.hops() - cluster.hops(),
    )


def plane_switches(topology: Topology, plane: int, planes: int) -> range:
    """The switches of one of several equal planes."""
    if not 0 <= plane < planes:
        raise ValueError(f"{plane=} must be from 0 to {planes - 1}")
    size = topology.num_switches // planes
    return range(plane * size, (plane + 1) * size)


def _busiest(cluster: Cluster, policy: Policy) -> float:
    """Seconds of the busiest link in an all-to-all of one byte between the nodes."""
    M, G = cluster.num_nodes, cluster.node.gpus
    routes = exchange(cluster, np.ones((M, M, G)), policy)
    return float(np.max(load(routes, cluster.topology.num_links) / cluster.capacity_L))
