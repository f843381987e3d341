"""Which expert, and which copy of it, lies on which device, so that devices get equal loads.

The balancer that DeepSeek published for V3 (EPLB): the busiest experts are given copies, and
copies are packed on devices. Arrays: L layers, E experts, P places (equally many on each device,
device by device), J copies of one expert. A load is any count of tokens; copies share it evenly.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

# Placements of one layer that are tried one by one, if there are no more than these.
ENUMERABLE = 20_000


class Placement(NamedTuple):
    """Where experts lie."""

    expert_LP: np.ndarray  # the expert in each place
    place_LEJ: np.ndarray  # the places of each expert, padded with -1
    copies_LE: np.ndarray


def balance(
    load_LE: np.ndarray, *, places: int, devices: int, nodes: int = 1, groups: int = 1
) -> Placement:
    """The published balancer.

    Hierarchical where nodes divide the expert groups: groups are packed on nodes, then experts
    copied and packed inside each node, so that a token's groups stay on as many nodes as before
    (prefill). Otherwise global, without regard to groups and nodes (decode).

    Raises:
      ValueError: fewer places than experts, or numbers that do not divide each other.
    """
    load_LE = check(load_LE, places=places, devices=devices, nodes=nodes, groups=groups)
    if groups % nodes:
        nodes = groups = 1
    L, E = load_LE.shape
    group_LG = load_LE.reshape(L, groups, E // groups).sum(2)
    slot_LG = pack(group_LG, nodes)
    # Experts in the order of the nodes that their groups go to.
    order_LG = np.argsort(slot_LG, axis=1)
    size = E // groups
    order_LE = (order_LG[:, :, None] * size + np.arange(size)).reshape(L, E)
    node_E = np.take_along_axis(load_LE, order_LE, 1).reshape(L * nodes, E // nodes)
    copied, count = replicate(node_E, places // nodes)
    share = np.take_along_axis(node_E / count, copied, 1)
    slot = pack(share, devices // nodes)
    local = np.take_along_axis(copied, np.argsort(slot, axis=1), 1).reshape(L, nodes, -1)
    first = np.arange(nodes)[:, None] * (E // nodes)
    return placement(np.take_along_axis(order_LE, (local + first).reshape(L, places), 1), E)


def pack(weight_LI: np.ndarray, packs: int) -> np.ndarray:
    """The slot of each item: pack after pack, equally many items in each, weights about even.

    Items are taken from the heaviest to the lightest, each to the lightest pack with room.
    """
    L, items = weight_LI.shape
    room = items // packs
    if room == 1:
        # As published: one item a pack is left where it is.
        return np.broadcast_to(np.arange(items), (L, items))
    rows = np.arange(L)
    slot_LI = np.zeros((L, items), np.int64)
    weight_LK, count_LK = np.zeros((L, packs)), np.zeros((L, packs), np.int64)
    for item_L in np.argsort(-weight_LI, axis=1, kind="stable").T:
        pack_L = np.where(count_LK < room, weight_LK, np.inf).argmin(1)
        slot_LI[rows, item_L] = pack_L * room + count_LK[rows, pack_L]
        weight_LK[rows, pack_L] += weight_LI[rows, item_L]
        count_LK[rows, pack_L] += 1
    return slot_LI


def replicate(load_LE: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert in each of more places than experts, and the copies of each expert.

    Every expert once; then a copy each time for the expert with the most load to a copy.
    """
    L, E = load_LE.shape
    rows = np.arange(L)
    expert_LP = np.tile(np.arange(E), (L, 1))
    count_LE = np.ones((L, E), np.int64)
    for _ in range(places - E):
        expert_L = (load_LE / count_LE).argmax(1)
        expert_LP = np.concatenate((expert_LP, expert_L[:, None]), axis=1)
        count_LE[rows, expert_L] += 1
    return expert_LP, count_LE


def placement(expert_LP: np.ndarray, experts: int) -> Placement:
    """The two inverse tables of a table of places."""
    copies_LE = np.stack([np.bincount(row, minlength=experts) for row in expert_LP])
    place_LEJ = np.full((*copies_LE.shape, copies_LE.max()), -1)
    for row, places_EJ in zip(expert_LP, place_LEJ, strict=True):
        order = np.argsort(row, kind="stable")
        rank = np.arange(len(row)) - np.searchsorted(row[order], row[order])
        places_EJ[row[order], rank] = order
    return Placement(np.asarray(expert_LP), place_LEJ, copies_LE)


def in_order(experts: int, *, places: int, layers: int = 1) -> Placement:
    """No balancing: every expert once, device by device, and the first ones again."""
    return placement(np.tile(np.arange(places) % experts, (layers, 1)), experts)


def device_load(load_LE: np.ndarray, placed: Placement, devices: int) -> np.ndarray:
    """What each device gets, [L, devices]."""
    share_LE = np.asarray(load_LE, np.float64) / placed.copies_LE
    share_LP = np.take_along_axis(share_LE, placed.expert_LP, 1)
    return share_LP.reshape(len(share_LP), devices, -1).sum(2)


def device_rows(counts_SE: np.ndarray, expert_P: np.ndarray, devices: int) -> np.ndarray:
    """Rows of each device of a layer, exactly, as dispatch deals choices to copies.

    Device s of S, which has counts_SE[s] choices of each expert, begins with copy s and takes the
    copies in turn.
    """
    S, E = counts_SE.shape
    rows_P = np.zeros(len(expert_P), np.int64)
    for expert in range(E):
        places = np.flatnonzero(expert_P == expert)
        for sender, copy in np.ndindex(S, len(places)):
            before = (copy - sender) % len(places)
            rows_P[places[copy]] += -(-max(counts_SE[sender, expert] - before, 0) // len(places))
    return rows_P.reshape(devices, -1).sum(1)


def busiest_over_mean(load_LE: np.ndarray, placed: Placement, devices: int) -> np.ndarray:
    """The load of the busiest device over the mean, [L]; 1 where nothing is loaded."""
    device_LK = device_load(load_LE, placed, devices)
    mean_L = device_LK.mean(1)
    return np.where(mean_L > 0, device_LK.max(1) / np.maximum(mean_L, 1e-300), 1.0)


def improve(
    load_LE: np.ndarray, placed: Placement, *, devices: int, nodes: int = 1
) -> Placement:
    """A placement no worse than the given one.

    As long as it makes the busiest device less busy, one of its experts changes place with
    another of the same node, or gets the place of a copy that is missed less. On one node, a
    layer with few possible placements gets the best of them all.
    """
    load_LE = np.asarray(load_LE, np.float64)
    L, E = load_LE.shape
    P = placed.expert_LP.shape[1]
    few = nodes == 1 and _placements(E, P, devices) <= ENUMERABLE
    rows = []
    for load_E, expert_P in zip(load_LE, placed.expert_LP, strict=True):
        if few:
            rows.append(_best_of_all(load_E, P, devices))
        else:
            rows.append(_climb(load_E, expert_P.copy(), devices, nodes))
    return placement(np.stack(rows), E)


def _placements(experts: int, places: int, devices: int) -> int:
    """How many ways there are to fill devices, up to the order of devices and on them."""
    on_one = math.comb(experts + places // devices - 1, places // devices)
    return math.comb(on_one + devices - 1, devices)


def _best_of_all(load_E: np.ndarray, places: int, devices: int) -> np.ndarray:
    experts = len(load_E)
    one = list(itertools.combinations_with_replacement(range(experts), places // devices))
    every = itertools.combinations_with_replacement(one, devices)
    expert_XP = np.array(list(every)).reshape(-1, places)
    copies_XE = np.stack([(expert_XP == e).sum(1) for e in range(experts)], axis=1)
    whole = copies_XE.all(1)
    expert_XP, share_XE = expert_XP[whole], load_E / copies_XE[whole]
    share_XP = np.take_along_axis(share_XE, expert_XP, 1)
    busiest_X = share_XP.reshape(len(share_XP), devices, -1).sum(2).max(1)
    return expert_XP[busiest_X.argmin()]


def _climb(load_E, expert_P, devices: int, nodes: int) -> np.ndarray:
    """Takes the best exchange or new copy for the busiest device until none helps."""
    P, E = len(expert_P), len(load_E)
    device_P = np.arange(P) // (P // devices)
    node_P = np.arange(P) // (P // nodes)

    def busiest(candidate_XP):
        copies_XE = np.stack([np.bincount(row, minlength=E) for row in candidate_XP])
        share_XE = np.where(copies_XE > 0, load_E / np.maximum(copies_XE, 1), np.inf)
        share_XP = np.take_along_axis(share_XE, candidate_XP, 1)
        return share_XP.reshape(len(candidate_XP), devices, -1).sum(2)

    while True:
        device_K = busiest(expert_P[None])[0]
        hot = np.flatnonzero(device_P == device_K.argmax())
        count_E = np.bincount(expert_P, minlength=E)
        near = np.flatnonzero((node_P == node_P[hot[0]]) & (device_P != device_P[hot[0]]))
        tried = []
        for place in hot:
            exchange_XP = np.tile(expert_P, (len(near), 1))
            exchange_XP[np.arange(len(near)), near] = expert_P[place]
            exchange_XP[:, place] = expert_P[near]
            spare = near[count_E[expert_P[near]] > 1]
            copy_XP = np.tile(expert_P, (len(spare), 1))
            copy_XP[np.arange(len(spare)), spare] = expert_P[place]
            tried += [exchange_XP, copy_XP]
        tried_XP = np.concatenate(tried)
        if not len(tried_XP):
            return expert_P
        device_XK = busiest(tried_XP)
        # Of several equally busy devices one is relieved at a time: squares tell progress.
        square_X = (device_XK**2).sum(1)
        square_X[device_XK.max(1) > device_K.max() * (1 + 1e-12)] = np.inf
        if square_X.min() >= (device_K**2).sum() * (1 - 1e-12):
            return expert_P
        expert_P = tried_XP[square_X.argmin()]


def check(load_LE, *, places: int, devices: int, nodes: int, groups: int) -> np.ndarray:
    """The loads in float64, if they and the numbers fit together."""
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2 or 0 in load_LE.shape:
        raise ValueError(f"loads of shape {load_LE.shape} must be [layers, experts]")
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ValueError("loads must be finite and not negative")
    experts = load_LE.shape[1]
    for name, value in (("devices", devices), ("nodes", nodes), ("groups", groups)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if places < experts:
        raise ValueError(f"{places=} must be at least {experts=}: every expert needs one")
    if places % devices:
        nearest = -(-places // devices) * devices
        raise ValueError(f"{places=} must be divisible by {devices=}: use {nearest}")
    if devices % nodes:
        raise ValueError(f"{devices=} must be divisible by {nodes=}")
    if experts % groups:
        raise ValueError(f"{experts=} must be divisible by {groups=}")
    return load_LE
