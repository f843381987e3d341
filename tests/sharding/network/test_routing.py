"""Routes: real, shortest, and spread as their policy says."""

import numpy as np
import pytest

from sharding.network.dragonfly import dragonfly
from sharding.network.fat_tree import planes_of, three_layer_fat_tree, two_layer_fat_tree
from sharding.network.flows import load
from sharding.network.paths import distances
from sharding.network.routing import route
from sharding.network.slim_fly import slim_fly

POLICIES = ("ecmp", "static", "adaptive")
NETWORKS = {
    "FT2": lambda: two_layer_fat_tree(8),
    "FT3": lambda: three_layer_fat_tree(4),
    "SF": lambda: slim_fly(5),
    "DF": lambda: dragonfly(per_switch=2, group_size=4, global_ports=2, groups=5, ports=7),
}


def everyone_to_everyone(topology):
    source, target = (x.ravel() for x in np.indices((topology.num_endpoints,) * 2))
    apart = source != target
    return source[apart], target[apart]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_route_is_a_shortest_path_from_source_to_target(name, policy):
    topology = NETWORKS[name]()
    source, target = everyone_to_everyone(topology)
    routes = route(topology, source, target, np.ones(len(source)), policy, parts=2)
    assert routes.bytes_R.sum() == pytest.approx(len(source))
    ends = np.concatenate((topology.ends_C2, topology.ends_C2[:, ::-1]), axis=1).reshape(-1, 2)
    hops_SS = distances(topology)
    for r in range(0, len(routes.flow_R), 97):
        links = routes.link_PR[:, r]
        links = links[links < topology.num_links]
        s, t = source[routes.flow_R[r]], target[routes.flow_R[r]]
        assert (links[0], links[-1]) == (topology.link_in(s), topology.link_out(t))
        at, to = topology.switch_E[s], topology.switch_E[t]
        assert len(links) - 2 == hops_SS[at, to]
        for link in links[1:-1]:
            assert ends[link][0] == at
            at = ends[link][1]
        assert at == to


def test_a_hash_spreads_evenly_and_is_the_same_every_time():
    topology = two_layer_fat_tree(16, 2)
    source, target = (x.ravel() for x in np.indices((8, 8)))
    source, target = np.tile(source, 50), np.tile(target + 8, 50)
    moved = np.ones(len(source))
    first = route(topology, source, target, moved, "ecmp")
    uplinks = np.bincount(first.link_PR[1], minlength=topology.num_links)
    uplinks = uplinks[uplinks > 0]
    # Chi-square with 7 degrees of freedom: below 24 in 999 of 1,000 fair draws.
    assert len(uplinks) == 8 and ((uplinks - 400.0) ** 2 / 400).sum() < 24
    again = route(topology, source, target, moved, "ecmp")
    assert (first.link_PR == again.link_PR).all()
    other = route(topology, source, target, moved, "ecmp", seed=1)
    assert (first.link_PR != other.link_PR).any()


@pytest.mark.parametrize(
    "build",
    [two_layer_fat_tree, three_layer_fat_tree, lambda ports: two_layer_fat_tree(2 * ports, 4),
     lambda ports: three_layer_fat_tree(ports, 2)],
    ids=["FT2", "FT3", "FT2-4-leaves", "FT3-2-pods"],
)  # fmt: skip
@pytest.mark.parametrize("shift", [3, 5, 16, 37])
def test_tables_by_target_carry_shifts_without_conflict(build, shift):
    topology = build(8)
    ends = np.arange(topology.num_endpoints)
    target = np.roll(ends, -shift)
    bytes_F = np.ones(len(ends))
    busiest = {
        policy: load(route(topology, ends, target, bytes_F, policy), topology.num_links).max()
        for policy in ("static", "ecmp")
    }
    assert busiest["static"] == 1
    assert busiest["ecmp"] > 1


@pytest.mark.parametrize("name", NETWORKS)
def test_adaptive_routes_are_no_fuller_than_hashed_ones(name):
    topology = NETWORKS[name]()
    source, target = everyone_to_everyone(topology)
    load_of = lambda policy: load(
        route(topology, source, target, np.ones(len(source)), policy), topology.num_links
    )
    inner = slice(0, 2 * topology.num_cables)
    adaptive, hashed = load_of("adaptive")[inner], load_of("ecmp")[inner]
    # Shortest paths either way: the same work, otherwise spread.
    assert adaptive.sum() == hashed.sum()
    assert adaptive.max() <= hashed.max()
    if name == "FT2":
        assert adaptive.max() == adaptive.min()


def test_adaptive_routes_step_around_a_busy_path():
    topology = two_layer_fat_tree(8, 2)
    # Seven of eight parts of four flows leave an even load on four spines.
    routes = route(
        topology, np.arange(4), np.arange(4, 8), np.array([1.0, 1, 1, 5]), "adaptive", parts=4
    )
    assert np.ptp(load(routes, topology.num_links)[: 2 * topology.num_cables : 2][:4]) < 1e-9


def test_routes_that_cannot_be():
    planes = planes_of(two_layer_fat_tree(4), 2)
    one = np.ones(1)
    with pytest.raises(ValueError, match="no path from endpoint 0 to 8"):
        route(planes, np.array([0]), np.array([8]), one, "ecmp")
    with pytest.raises(ValueError, match="no path from endpoint 0 to 1"):
        route(planes.without(endpoints=[1]), np.array([0]), np.array([1]), one, "static")
    with pytest.raises(ValueError, match="'random': use ecmp, static or adaptive"):
        route(planes, np.array([0]), np.array([1]), one, "random")
    with pytest.raises(ValueError, match="parts=0"):
        route(planes, np.array([0]), np.array([1]), one, "ecmp", parts=0)
