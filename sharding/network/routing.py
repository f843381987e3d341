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
from sharding.network.paths import FAR, distances, shortest_paths
from sharding.network.topology import Topology

Policy = Literal["ecmp", "static", "adaptive"]
# Flows that are looked at together; bounds the memory of large networks.
CHUNK = 1 << 21


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
        # What lies next depends on (here, target) alone: it is worked out once for each pair.
        key = at_R[on] * size + last_R[on]
        used = np.zeros(size * size, bool)
        used[key] = True
        pairs = np.flatnonzero(used)
        number = np.zeros(size * size, np.int32)
        number[pairs] = np.arange(len(pairs))
        here, there = pairs // size, pairs % size
        near = neighbour_SD[here]
        nearer = (near >= 0) & (hops_SS[near, there[:, None]] == hops_SS[here, there][:, None] - 1)
        slots = np.argsort(~nearer, axis=1, kind="stable").astype(np.int16)
        choices = nearer.sum(1)
        pair = number[key]
        slot = slots[pair, pick(hop, on, choices[pair])]
        inner_PR[hop, on] = link_SD[at_R[on], slot]
        at_R[on] = neighbour_SD[at_R[on], slot]


def _by_target(target_R) -> Callable:
    """Digits of the target's number: its last at the first choice, and so on."""
    quotient_R = target_R.astype(np.int64)

    def pick(hop, on, choices):
        chosen = quotient_R[on] % choices
        quotient_R[on] //= choices
        return chosen

    return pick


def _by_hash(source_R, target_R, number_R, seed: int) -> Callable:
    """A mixer of 64 bits over source, target, part and hop: the same flow, the same path."""
    mixed_R = _mix(source_R.astype(np.uint64) + np.uint64(1 + (seed << 32)))
    mixed_R = _mix(mixed_R ^ target_R.astype(np.uint64))
    mixed_R = _mix(mixed_R ^ number_R.astype(np.uint64))

    def pick(hop, on, choices):
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

    Routes between the same switches are dealt together, one to each path in the order of how
    full it is.
    """
    size = topology.num_switches
    full_L = np.zeros(topology.num_links)
    key_R = first_R.astype(np.int64) * size + last_R
    order = np.argsort(key_R, kind="stable")
    starts = np.flatnonzero(np.diff(key_R[order], prepend=-1))
    for begin, end in zip(starts, np.append(starts[1:], len(order)), strict=True):
        group = order[begin:end]
        first, last = int(first_R[group[0]]), int(last_R[group[0]])
        if first == last:
            continue
        link_KH = shortest_paths(topology, first, last, hops_SS)
        paths, hops = link_KH.shape
        while len(group):
            crowd_KH = full_L[link_KH]
            best = np.lexsort((crowd_KH.sum(1), crowd_KH.max(1)))
            rounds = max(len(group) // paths, 1)
            now, group = group[: rounds * paths], group[rounds * paths :]
            path = np.resize(best, len(now))
            inner_PR[:hops, now] = link_KH[path].T
            np.add.at(full_L, link_KH[path], bytes_R[now, None])
