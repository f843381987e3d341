"""Shortest paths between switches: how long, how many, which; and the narrowest cut in halves."""

from collections.abc import Iterator

import numpy as np

from sharding.network.topology import Topology

FAR = 127  # the distance of switches that no path joins
# Halves that `bisection` tries beyond the obvious ones.
SWEEPS, ROUNDS = 6, 8


def _reached(topology: Topology) -> Iterator[np.ndarray]:
    """Which switches each switch reaches in 0, 1, 2, ... hops, as bits [S, S / 8] until all are.

    One hop of all pairs is an "or" over neighbours, so 16 thousand switches take a second.
    """
    size = topology.num_switches
    neighbour_SD, _ = topology.adjacency
    # One row more, empty, for the padding.
    bits = np.zeros((size + 1, -(-size // 64) * 8), np.uint8)
    bits[np.arange(size), np.arange(size) // 8] = 128 >> np.arange(size) % 8
    bits = bits.view(np.uint64)
    while True:
        yield bits[:-1].view(np.uint8)
        following = bits.copy()
        for neighbour_S in neighbour_SD.T:
            following[:-1] |= bits[neighbour_S]
        if np.array_equal(following, bits):
            return
        bits = following


def distances(topology: Topology) -> np.ndarray:
    """Hops between every two switches, int8 [S, S]; FAR where there is no path."""
    size = topology.num_switches
    hops_SS = np.full((size, size), FAR, np.int8)
    for hops, bits in enumerate(_reached(topology)):
        seen = np.unpackbits(bits, axis=1, count=size).astype(bool)
        np.minimum(hops_SS, np.where(seen, np.int8(hops), np.int8(FAR)), out=hops_SS)
    return hops_SS


def diameter(topology: Topology) -> int:
    """The most hops between two switches that carry endpoints.

    Raises:
      ValueError: two of them are joined by no path.
    """
    edge = np.unique(topology.switch_E[topology.switch_E >= 0])
    wanted = np.zeros(topology.num_switches, bool)
    wanted[edge] = True
    wanted = np.packbits(wanted)
    for hops, bits in enumerate(_reached(topology)):
        if (bits[edge, : len(wanted)] & wanted == wanted).all():
            return hops
    raise ValueError(f"{topology.name} is not connected: it has no diameter")


def path_counts(topology: Topology, source: int, hops_S: np.ndarray) -> np.ndarray:
    """How many shortest paths lead from a switch to every other; hops_S are its distances."""
    neighbour_SD, _ = topology.adjacency
    count_S = np.zeros(topology.num_switches, np.int64)
    count_S[source] = 1
    for hops in range(1, int(hops_S[hops_S < FAR].max(initial=0)) + 1):
        ring = np.flatnonzero(hops_S == hops)
        before = (neighbour_SD[ring] >= 0) & (hops_S[neighbour_SD[ring]] == hops - 1)
        count_S[ring] = np.where(before, count_S[neighbour_SD[ring]], 0).sum(1)
    return count_S


def shortest_paths(
    topology: Topology, source: int, target: int, hops_SS: np.ndarray, most: int = 4096
) -> np.ndarray:
    """The links of the shortest paths between two switches, [paths, hops], at most `most`."""
    neighbour_SD, link_SD = topology.adjacency
    at_K, link_KH = np.array([source]), np.zeros((1, 0), np.int32)
    for left in range(int(hops_SS[source, target]) - 1, -1, -1):
        near_KD = neighbour_SD[at_K]
        path_N, slot_N = np.nonzero((near_KD >= 0) & (hops_SS[near_KD, target] == left))
        path_N, slot_N = path_N[:most], slot_N[:most]
        link_N = link_SD[at_K[path_N], slot_N]
        link_KH = np.concatenate((link_KH[path_N], link_N[:, None]), axis=1)
        at_K = near_KD[path_N, slot_N]
    return link_KH


def bundled_paths(
    topology: Topology, source: int, target: int, hops_SS: np.ndarray, most: int = 4096
) -> np.ndarray:
    """The shortest paths between two switches, cables side by side counted as one.

    Returns [paths, hops, J]: the J cables of each hop, the first one repeated where there are
    fewer.
    """
    neighbour_SD, link_SD = topology.adjacency
    at_KH = np.array([[source]])
    for left in range(int(hops_SS[source, target]) - 1, -1, -1):
        near_KD = neighbour_SD[at_KH[:, -1]]
        nearer = (near_KD >= 0) & (hops_SS[near_KD, target] == left)
        # Equal neighbours stand side by side: the first of them stands for all.
        nearer[:, 1:] &= near_KD[:, 1:] != near_KD[:, :-1]
        path_N, slot_N = (index[:most] for index in np.nonzero(nearer))
        at_KH = np.concatenate((at_KH[path_N], near_KD[path_N, slot_N][:, None]), axis=1)
    here_KH, there_KH = at_KH[:, :-1], at_KH[:, 1:]
    joins_KHD = neighbour_SD[here_KH] == there_KH[..., None]
    slot_KHD = np.argsort(~joins_KHD, axis=2, kind="stable")
    slot_KHJ = slot_KHD[..., : int(joins_KHD.sum(2).max(initial=1))]
    real_KHJ = np.take_along_axis(joins_KHD, slot_KHJ, 2)
    return link_SD[here_KH[..., None], np.where(real_KHJ, slot_KHJ, slot_KHJ[..., :1])]


def min_cut(topology: Topology, left: np.ndarray, right: np.ndarray) -> int:
    """Fewest cables whose loss parts two sets of switches; those in neither fall to a side."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    size, endless = topology.num_switches, 1 << 30
    a_C, b_C = topology.ends_C2[topology.ends_C2[:, 0] >= 0].T
    source_L = np.concatenate((a_C, b_C, np.full(len(left), size), right))
    target_L = np.concatenate((b_C, a_C, left, np.full(len(right), size + 1)))
    capacity_L = np.ones(len(source_L), np.int32)
    capacity_L[2 * len(a_C) :] = endless
    graph = coo_array((capacity_L, (source_L, target_L)), shape=(size + 2, size + 2)).tocsr()
    return int(maximum_flow(graph.astype(np.int32), size, size + 1).flow_value)


def bisection(topology: Topology) -> int:
    """The narrowest cut in cables found between two halves of the switches that carry endpoints.

    The narrowest of all halves is out of reach, so this is an upper bound: tried are halves in
    the order of the switches and in the order of the slowest modes of the graph, made better by
    exchanging switches.
    """
    edge = np.unique(topology.switch_E[topology.switch_E >= 0])
    half = len(edge) // 2
    if not half:
        return 0
    best = None
    for order in [np.arange(len(edge)), *_slow_modes(topology, edge)]:
        left = np.zeros(topology.num_switches, bool)
        left[edge[order[:half]]] = True
        left = _exchanged(topology, edge, left)
        cut = min_cut(topology, edge[left[edge]], edge[~left[edge]])
        best = cut if best is None else min(best, cut)
    return best


def _slow_modes(topology: Topology, edge: np.ndarray) -> Iterator[np.ndarray]:
    """Orders of the switches by combinations of the two slowest modes of the graph's Laplacian."""
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import eigsh

    size = topology.num_switches
    if size < 8:
        return
    a_C, b_C = topology.ends_C2[topology.ends_C2[:, 0] >= 0].T
    ones = np.ones(2 * len(a_C))
    joined = coo_array(
        (ones, (np.concatenate((a_C, b_C)), np.concatenate((b_C, a_C)))), shape=(size, size)
    ).tocsr()
    degree = np.asarray(joined.sum(0)).ravel()
    scale = 1 / np.sqrt(np.maximum(degree, 1))
    similar = joined.multiply(scale[:, None]).multiply(scale[None, :]).tocsr()
    start = np.cos(np.arange(size) + 1.0)
    _, modes = eigsh(similar, k=3, which="LA", v0=start)
    for turn in range(SWEEPS):
        angle = np.pi * turn / SWEEPS
        mode = np.cos(angle) * modes[:, 1] + np.sin(angle) * modes[:, 0]
        yield np.argsort((mode * scale)[edge], kind="stable")


def _exchanged(topology: Topology, edge: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The half after exchanging the switches that gain most, as long as the cut narrows.

    Only cables between switches with endpoints are looked at, so fat trees stay as they are.
    """
    neighbour_SD, _ = topology.adjacency
    real_SD = neighbour_SD >= 0
    carries = np.zeros(topology.num_switches, bool)
    carries[edge] = True
    width = lambda side: int((real_SD[side] & ~side[neighbour_SD[side]]).sum())
    for _ in range(ROUNDS * len(edge)):
        other = real_SD & carries[neighbour_SD]
        across = left[neighbour_SD] != left[:, None]
        gain_S = np.where(other & across, 1, np.where(other, -1, 0)).sum(1)
        inside, outside = edge[left[edge]], edge[~left[edge]]
        a, b = inside[gain_S[inside].argmax()], outside[gain_S[outside].argmax()]
        tried = left.copy()
        tried[[a, b]] = ~tried[[a, b]]
        if width(tried) >= width(left):
            return left
        left = tried
    return left
