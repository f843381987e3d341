"""Which shortest path a flow takes: by hash, by a fixed table, or where least is going on.

ecmp      every switch picks among its next hops by a hash of the flow
static    every switch picks by the number of the target: tables as InfiniBand's, which keep
          regular traffic apart (destination mod k in a fat tree)
adaptive  every part of a flow goes where the fullest link is emptiest when its turn comes
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from sharding.network.flows import Routes
from sharding.network.paths import FAR, bundled_paths, distances
from sharding.network.topology import Topology

Policy = Literal["ecmp", "static", "adaptive"]
# Flows that are looked at together; bounds the memory of large networks.
CHUNK = 1 << 21
# From so many routes a path on, adaptive routing deals them out equally.
MANY = 4


def route(
    topology: Topology,
    source_F: np.ndarray,
    target_F: np.ndarray,
    bytes_F: np.ndarray,
    policy: Policy,
    *,
    parts: int = 1,
    seed: int = 0,
) -> Routes:
    """The links of flows between endpoints, each cut in equal parts that are routed apart.

    Parts of a flow are what a transport spreads over paths: queue pairs under ecmp, packets under
    adaptive routing.

    Raises:
      ValueError: an unknown policy, or endpoints that no path joins.
    """
    if policy not in ("ecmp", "static", "adaptive"):
        raise ValueError(f"unknown routing {policy!r}: use ecmp, static or adaptive")
    if parts < 1:
        raise ValueError(f"{parts=} must be at least 1")
    flow_R = np.repeat(np.arange(len(source_F), dtype=np.int32), parts)
    bytes_R = np.asarray(bytes_F, np.float64)[flow_R] / parts
    source_R, target_R = source_F[flow_R], target_F[flow_R]
    hops_SS = distances(topology)
    first_R, last_R = topology.switch_E[source_R], topology.switch_E[target_R]
    lost = np.flatnonzero((first_R < 0) | (last_R < 0) | (hops_SS[first_R, last_R] == FAR))
    if len(lost):
        raise ValueError(
            f"{topology.name}: no path from endpoint {source_R[lost[0]]} to {target_R[lost[0]]}"
        )
    longest = int(hops_SS[first_R, last_R].max(initial=0))
    link_PR = np.full((longest + 2, len(flow_R)), topology.num_links, np.int32)
    link_PR[0] = topology.link_in(source_R)
    link_PR[-1] = topology.link_out(target_R)
    inner_PR = link_PR[1:-1]
    if policy == "adaptive":
        _adaptive(topology, hops_SS, first_R, last_R, bytes_R, inner_PR)
    else:
        for begin in range(0, len(flow_R), CHUNK):
            part = slice(begin, begin + CHUNK)
            if policy == "ecmp":
                number = np.arange(begin, begin + len(flow_R[part]))
                pick = _by_hash(source_R[part], target_R[part], number, seed)
            else:
                pick = _by_target(target_R[part])
            _hop_by_hop(
                topology, hops_SS, first_R[part], last_R[part], inner_PR[:, part], pick
            )
    return Routes(flow_R, bytes_R, link_PR)


def _hop_by_hop(topology, hops_SS, first_R, last_R, inner_PR, pick: Callable) -> None:
    """Writes the links of routes whose switches choose among the next hops by `pick`."""
    size = topology.num_switches
    neighbour_SD, link_SD = topology.adjacency
    at_R = first_R.astype(np.int64)
    for hop in range(len(inner_PR)):
        on = np.flatnonzero(at_R != last_R)
        # What lies next depends on (here, target) alone: it is worked out once for each pair U.
        key_R = at_R[on] * size + last_R[on]
        used = np.zeros(size * size, bool)
        used[key_R] = True
        key_U = np.flatnonzero(used)
        number = np.zeros(size * size, np.int32)
        number[key_U] = np.arange(len(key_U))
        here_U, there_U = key_U // size, key_U % size
        near_UD, left_U = neighbour_SD[here_U], hops_SS[here_U, there_U]
        nearer_UD = hops_SS[near_UD, there_U[:, None]] == left_U[:, None] - 1
        nearer_UD &= near_UD >= 0
        slot_UD = np.argsort(~nearer_UD, axis=1, kind="stable").astype(np.int16)
        choices_U = nearer_UD.sum(1)
        # Cables to the same switch stand side by side; `same` is how many, if all have as many.
        turns_UD = np.diff(np.take_along_axis(near_UD, slot_UD, 1), axis=1) != 0
        turns_UD &= np.arange(turns_UD.shape[1]) < choices_U[:, None] - 1
        switches_U = 1 + turns_UD.sum(1)
        same_U = np.where(choices_U % switches_U == 0, choices_U // switches_U, 1)
        pair_R = number[key_R]
        slot_R = slot_UD[pair_R, pick(hop, on, choices_U[pair_R], same_U[pair_R])]
        inner_PR[hop, on] = link_SD[at_R[on], slot_R]
        at_R[on] = neighbour_SD[at_R[on], slot_R]


def _by_target(target_R) -> Callable:
    """Digits of the target's number: its last for the first choice of a switch, and so on.

    Of several cables to that switch, the following digit takes one, on the way up and down.
    """
    quotient_R = target_R.astype(np.int64)

    def pick(hop, on, choices, same):
        switches = choices // same
        chosen = quotient_R[on] % switches
        quotient_R[on] //= switches
        return chosen * same + quotient_R[on] % same

    return pick


def _by_hash(source_R, target_R, number_R, seed: int) -> Callable:
    """A mixer of 64 bits over source, target, part and hop: the same flow, the same path."""
    mixed_R = _mix(source_R.astype(np.uint64) + np.uint64(1 + (seed << 32)))
    mixed_R = _mix(mixed_R ^ target_R.astype(np.uint64))
    mixed_R = _mix(mixed_R ^ number_R.astype(np.uint64))

    def pick(hop, on, choices, same):
        return (_mix(mixed_R[on] + np.uint64(hop)) >> np.uint64(11)).astype(np.int64) % choices

    return pick


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _adaptive(topology, hops_SS, first_R, last_R, bytes_R, inner_PR) -> None:
    """Writes the links of routes dealt over the shortest paths of their two switches.

    Routes between the same switches are dealt together, the largest first: many of them equally
    to all paths, a few one after another to the path whose fullest link is emptiest. The few take
    their way again when all others have theirs.
    """
    size = topology.num_switches
    full_L = np.zeros(topology.num_links)
    key_R = first_R.astype(np.int64) * size + last_R
    order = np.lexsort((-bytes_R, key_R))
    starts = np.flatnonzero(np.diff(key_R[order], prepend=-1))
    again = []
    for group in np.split(order, starts[1:]) if len(order) else ():
        first, last = int(first_R[group[0]]), int(last_R[group[0]])
        if first == last:
            continue
        link_KHJ = bundled_paths(topology, first, last, hops_SS)
        paths = len(link_KHJ)
        many = len(group) // paths * paths if len(group) >= MANY * paths else 0
        _deal(link_KHJ, group[:many], bytes_R, full_L, inner_PR)
        for r in group[many:]:
            _take(link_KHJ, r, bytes_R, full_L, inner_PR)
        if many < len(group) and link_KHJ.shape[::2] != (1, 1):
            again.append((group[many:], link_KHJ))
    for group, link_KHJ in again:
        for r in group:
            full_L[inner_PR[: link_KHJ.shape[1], r]] -= bytes_R[r]
            _take(link_KHJ, r, bytes_R, full_L, inner_PR)


def _take(link_KHJ, r: int, bytes_R, full_L, inner_PR) -> None:
    """Gives one route the path whose fullest link is emptiest, the emptiest cable at each hop."""
    crowd_KHJ = full_L[link_KHJ]
    crowd_KH = crowd_KHJ.min(2)
    best = np.lexsort((crowd_KH.sum(1), crowd_KH.max(1)))[0]
    hops = link_KHJ.shape[1]
    links = link_KHJ[best, np.arange(hops), crowd_KHJ[best].argmin(1)]
    inner_PR[:hops, r] = links
    full_L[links] += bytes_R[r]


def _deal(link_KHJ, group, bytes_R, full_L, inner_PR) -> None:
    """Gives each path equally many routes of a group, and each cable of a hop those in turn."""
    paths, hops, cables = link_KHJ.shape
    if cables == 1:
        link_NH = link_KHJ[np.arange(len(group)) % paths, :, 0]
        inner_PR[:hops, group] = link_NH.T
        np.add.at(full_L, link_NH, bytes_R[group, None])
        return
    for k in range(paths):
        own = group[k::paths]
        for h in range(hops):
            links = np.unique(link_KHJ[k, h])
            links = np.resize(links[full_L[links].argsort(kind="stable")], len(own))
            inner_PR[h, own] = links
            np.add.at(full_L, links, bytes_R[own])
