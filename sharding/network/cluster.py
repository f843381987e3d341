"""Nodes on a network: GPUs, NVLink between them, NICs, and which NIC hangs where.

A GPU reaches a GPU of another node through the NIC of either's number. Where all NICs of a number
form a plane of their own, a message to another number must change GPU inside a node, over NVLink:
at the sender ("PXN", as NCCL does it) before it goes out, so that all of a node's messages to
one GPU leave together.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from sharding.network.fat_tree import half_of, planes_of, three_layer_fat_tree, two_layer_fat_tree
from sharding.network.latency import INFINIBAND, NVLINK, Latency
from sharding.network.paths import FAR, distances
from sharding.network.topology import Topology, components


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine; rates in bytes per second and direction. The defaults are an H800 node's.

    Rates are those of ISCA section 5.1 and 4.3: 8 NICs of 400 Gbit/s, and of NVLink's 200 GB/s
    the 160 that can be used.
    """

    gpus: int = 8  # and as many NICs
    nic_rate: float = 50e9
    nvlink_rate: float = 160e9
    link: Latency = INFINIBAND

    def __post_init__(self):
        if self.gpus < 1:
            raise ValueError(f"gpus={self.gpus} must be at least 1")
        for name in ("nic_rate", "nvlink_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, eq=False)
class Cluster:
    """M equal nodes on a network; endpoint_MI is where NIC i of node m is plugged in."""

    topology: Topology
    node: Node
    endpoint_MI: np.ndarray

    @property
    def num_nodes(self) -> int:
        return len(self.endpoint_MI)

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.node.gpus

    @property
    def capacity_L(self) -> np.ndarray:
        """Bytes per second of every link: cables are as fast as NICs."""
        return np.full(self.topology.num_links, self.node.nic_rate)

    @property
    def part_MI(self) -> np.ndarray:
        """The connected part of the network that each NIC lies in; -1 without a switch."""
        switch_MI = self.topology.switch_E[self.endpoint_MI]
        return np.where(switch_MI >= 0, components(self.topology)[switch_MI], -1)

    def without(self, **broken) -> "Cluster":
        """The cluster with switches, cables or endpoints broken."""
        return dataclasses.replace(self, topology=self.topology.without(**broken))

    def hops(self, straight: bool = False) -> int:
        """Cables between the switches of the two NICs that are farthest apart.

        Of NICs of one number, unless messages go straight from any to any.
        """
        hops_SS, farthest = distances(self.topology), 0
        switch_IM = self.topology.switch_E[self.endpoint_MI.T]
        for switch_M in [switch_IM.ravel()] if straight else switch_IM:
            switch = np.unique(switch_M[switch_M >= 0])
            hops = hops_SS[switch[:, None], switch]
            farthest = max(farthest, int(hops[hops < FAR].max(initial=0)))
        return farthest

    def latency(self, straight: bool = False) -> float:
        """Seconds of a small message between the two GPUs that are farthest apart.

        From NIC i to NIC i, and over NVLink to a GPU of another number, unless it goes straight.
        """
        network = self.node.link.of(self.hops(straight) + 1) if self.num_nodes > 1 else 0.0
        handed_on = self.node.gpus > 1 and (not straight or self.num_nodes == 1)
        return float(network + NVLINK.same_leaf * handed_on)


def multi_plane(num_nodes: int, *, node: Node | None = None, ports: int = 64) -> Cluster:
    """One plane for each NIC of a node, each a two-layer fat tree (ISCA, figure 3).

    Raises:
      ValueError: more nodes than a plane has endpoints.
    """
    node = node or Node()
    half = half_of(ports)
    most = ports * half
    if not 1 <= num_nodes <= most:
        raise ValueError(f"{num_nodes=} must be from 1 to {most}, the endpoints of a plane")
    plane = two_layer_fat_tree(ports, leaves=-(-num_nodes // half))
    first_I = np.arange(node.gpus) * plane.num_endpoints
    return Cluster(
        planes_of(plane, node.gpus), node, np.arange(num_nodes)[:, None] + first_I[None]
    )


def multi_rail(num_nodes: int, *, node: Node | None = None, ports: int = 64) -> Cluster:
    """One fat tree for all NICs; a leaf takes NICs of one number from ports/2 nodes: a rail.

    Two layers as long as they suffice, else three.
    """
    node = node or Node()
    half = half_of(ports)
    blocks = -(-num_nodes // half)  # of nodes whose NICs share leaves
    leaves = blocks * node.gpus
    if leaves <= ports:
        topology = two_layer_fat_tree(ports, leaves)
    else:
        topology = three_layer_fat_tree(ports, pods=-(-leaves // half))
    m, i = np.arange(num_nodes)[:, None], np.arange(node.gpus)[None]
    return Cluster(topology, node, ((m // half) * node.gpus + i) * half + m % half)


def attached(topology: Topology, num_nodes: int, *, node: Node | None = None) -> Cluster:
    """Nodes on any network, one after another: NIC i of node m is endpoint m * gpus + i.

    Raises:
      ValueError: more NICs than endpoints.
    """
    node = node or Node()
    if num_nodes * node.gpus > topology.num_endpoints:
        raise ValueError(
            f"{num_nodes} nodes of {node.gpus} NICs need {num_nodes * node.gpus} endpoints: "
            f"{topology.name} has {topology.num_endpoints}"
        )
    return Cluster(
        topology, node, np.arange(num_nodes * node.gpus).reshape(num_nodes, node.gpus)
    )
