"""What the network between nodes carries of a collective over mesh axes, all its groups at once.

Devices are numbered in the order of the mesh and fill nodes one after another. Every NIC of a node
is on a plane of its own, a fat tree (a rail of one where the nodes are too many for a plane).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sharding.network.cluster import Cluster, Node, multi_plane, multi_rail
from sharding.network.collectives import exchange
from sharding.network.flows import finish_seconds
from sharding.network.paths import distances

# A dimension of the mesh: its size, and whether the devices of a group differ in it.
Dimension = tuple[int, bool]


class Crossing(NamedTuple):
    """Between nodes, of one collective."""

    seconds: float  # for each byte that leaves a device, inside its node or not
    switches: int  # on the way between the two devices of a group that are farthest apart


def crossing(dimensions: Sequence[Dimension], node: int, rate: float, *, ring: bool) -> Crossing:
    """Of a ring through each group, or of an exchange between all of its devices.

    Args:
      node: devices of a node, each with a NIC.
      rate: of a NIC, bytes/s.
    """
    merged: list[Dimension] = []
    for size, varies in dimensions:
        if size == 1:
            continue
        if merged and merged[-1][1] == varies:
            size *= merged.pop()[0]
        merged.append((size, varies))
    return _crossing(tuple(merged), node, rate, ring)


@functools.cache
def _crossing(dimensions: tuple[Dimension, ...], node: int, rate: float, ring: bool) -> Crossing:
    sizes = [size for size, _ in dimensions]
    devices = math.prod(sizes)
    nodes = -(-devices // node)
    ids = np.arange(devices).reshape(sizes)
    last = [i for i, (_, varies) in enumerate(dimensions) if varies]
    members = math.prod(sizes[i] for i in last)
    ids_GK = np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, members)
    cluster = _cluster(nodes, min(node, devices), rate)
    bytes_MMI = _ring_bytes(ids_GK, cluster) if ring else _exchange_bytes(ids_GK, cluster)
    sent = (members - 1) / members
    seconds = finish_seconds(exchange(cluster, bytes_MMI, "adaptive"), cluster.capacity_L) / sent
    switch_GK = cluster.topology.switch_E[cluster.endpoint_MI[ids_GK // node, 0]]
    hops = distances(cluster.topology)[switch_GK[:, :1], switch_GK].max()
    return Crossing(float(seconds), int(hops) + 1)


@functools.cache
def _cluster(nodes: int, gpus: int, rate: float) -> Cluster:
    build = multi_plane if nodes <= 2048 else multi_rail
    return build(nodes, node=Node(gpus=gpus, nic_rate=rate))


def _ring_bytes(ids_GK: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Bytes from node to node over each NIC where every device passes on (K - 1) / K of a byte.

    A ring enters and leaves each node of its group once. So many rings as it has devices there
    share the bytes, each by another of their NICs.
    """
    gpus, K = cluster.node.gpus, ids_GK.shape[1]
    bytes_MMI = np.zeros((cluster.num_nodes, cluster.num_nodes, gpus))
    for id_K in ids_GK:
        node_N, place_K, count_N = np.unique(id_K // gpus, return_inverse=True, return_counts=True)
        there_N = np.roll(node_N, -1)
        index = (node_N[place_K], there_N[place_K], id_K % gpus)
        np.add.at(bytes_MMI, index, (K - 1) / K / count_N[place_K])
    return bytes_MMI


def _exchange_bytes(ids_GK: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Bytes from node to node over each NIC where every device sends 1 / K of a byte to each.

    They leave by the NIC of the target's number (collectives.all_to_all).
    """
    gpus, K = cluster.node.gpus, ids_GK.shape[1]
    bytes_MMI = np.zeros((cluster.num_nodes, cluster.num_nodes, gpus))
    source, target = ids_GK[:, :, None], ids_GK[:, None, :]
    index = np.broadcast_arrays(source // gpus, target // gpus, target % gpus)
    np.add.at(bytes_MMI, tuple(index), 1 / K)
    return bytes_MMI
