"""Dispatch and combine of expert parallelism: what tokens cost on the network, and how long.

Two ways to send a token to its experts. Grouped (training, prefill): once to every node that
holds one of them, to the GPU of the sender's own number, which hands copies on over NVLink
(ISCA section 4.3). Direct (decode): once for every expert, straight to its GPU.
"""

from typing import NamedTuple

import numpy as np

from sharding.network.cluster import Cluster
from sharding.network.collectives import Timing, exchange
from sharding.network.flows import finish_seconds
from sharding.network.routing import Policy


class Traffic(NamedTuple):
    """Token copies that move in a dispatch; in a combine the same ones move back."""

    copies_MMI: np.ndarray  # from node to node over NIC i; on the diagonal what stays at home
    copies_out_MI: np.ndarray  # what GPU i of a node hands to the others of its node
    copies_in_MI: np.ndarray  # what they hand to it


def grouped(gpu_GTK: np.ndarray, gpus: int) -> Traffic:
    """Copies of T tokens on each of G GPUs, whose K choices lie on the GPUs gpu_GTK."""
    G, T, K = gpu_GTK.shape
    M = _nodes(G, gpus)
    # A node, and a GPU on it, gets a token once however many of its experts are chosen.
    node_GTM = np.zeros((G, T, M), bool)
    np.put_along_axis(node_GTM, gpu_GTK // gpus, True, axis=2)
    copies_MMI = node_GTM.sum(1).reshape(M, gpus, M).transpose(0, 2, 1)
    found_GTG = np.zeros((G, T, G), bool)
    np.put_along_axis(found_GTG, gpu_GTK, True, axis=2)
    # GPU g's copies for node b are handed on there by the GPU of g's number.
    handed_MIMJ = _handed(found_GTG.sum(1).reshape(M, gpus, M, gpus))
    return Traffic(copies_MMI, handed_MIMJ.sum((0, 3)).T, handed_MIMJ.sum((0, 1)))


def direct(gpu_GTK: np.ndarray, gpus: int) -> Traffic:
    """Copies when every choice is sent by itself, by way of the target's number."""
    G, T, K = gpu_GTK.shape
    M = _nodes(G, gpus)
    pairs_GG = np.stack([np.bincount(chosen.ravel(), minlength=G) for chosen in gpu_GTK])
    pairs_MIMJ = pairs_GG.reshape(M, gpus, M, gpus)
    # Before it leaves, a copy for another number goes to that GPU of the sender's node.
    handed_MIMJ = _handed(pairs_MIMJ)
    return Traffic(
        pairs_MIMJ.sum(1), handed_MIMJ.sum((2, 3)), handed_MIMJ.sum((1, 2))
    )


def _handed(pairs_MIMJ: np.ndarray) -> np.ndarray:
    """The copies that take NVLink: none between GPUs of one number, where the NIC is their own."""
    same = np.eye(pairs_MIMJ.shape[1], dtype=bool)
    return np.where(same[None, :, None, :], 0, pairs_MIMJ)


def dispatch(
    cluster: Cluster, traffic: Traffic, token_bytes: float, *, policy: Policy = "adaptive",
    resolution: float = 1e-3,
) -> Timing:  # fmt: skip
    """Seconds to bring every copy to its GPU.

    `bytes_per_gpu` counts a token once for every node it is wanted on, its own too: the way in
    which DeepEP reports its rates, which is why they can exceed a NIC's.
    """
    return _timed(cluster, traffic, traffic.copies_MMI, token_bytes, policy, resolution)


def combine(
    cluster: Cluster, traffic: Traffic, token_bytes: float, *, policy: Policy = "adaptive",
    resolution: float = 1e-3,
) -> Timing:  # fmt: skip
    """Seconds to bring every copy's result back, added up on each node before it leaves."""
    back_MMI = traffic.copies_MMI.transpose(1, 0, 2)
    return _timed(cluster, traffic, back_MMI, token_bytes, policy, resolution)


def _timed(cluster, traffic, copies_MMI, token_bytes, policy, resolution) -> Timing:
    routes = exchange(cluster, copies_MMI * float(token_bytes), policy)
    busiest = max(traffic.copies_in_MI.max(), traffic.copies_out_MI.max())
    return Timing(
        network=finish_seconds(routes, cluster.capacity_L, resolution=resolution),
        nvlink=float(busiest * token_bytes / cluster.node.nvlink_rate),
        latency=cluster.latency(),
        bytes_per_gpu=float(copies_MMI.sum() * token_bytes / cluster.num_gpus),
    )


def _nodes(num_gpus: int, gpus: int) -> int:
    if num_gpus % gpus:
        raise ValueError(f"{num_gpus} GPUs are no whole number of nodes of {gpus}")
    return num_gpus // gpus
