"""Distances, path counts and cuts, held against networkx and against all halves of small graphs."""

import itertools

import networkx as nx
import numpy as np
import pytest

from sharding.network.dragonfly import dragonfly
from sharding.network.fat_tree import three_layer_fat_tree, two_layer_fat_tree
from sharding.network.paths import (
    FAR,
    bisection,
    distances,
    min_cut,
    path_counts,
    shortest_paths,
)
from sharding.network.slim_fly import slim_fly
from sharding.network.topology import Topology

SMALL = {
    "FT2": lambda: two_layer_fat_tree(6),
    "FT3": lambda: three_layer_fat_tree(4),
    "SF3": lambda: slim_fly(3),
    "SF4": lambda: slim_fly(4),
    "DF": lambda: dragonfly(per_switch=1, group_size=2, global_ports=1, ports=3),
    "DF-doubled": lambda: dragonfly(per_switch=2, group_size=4, global_ports=2, groups=5, ports=7),
    "broken": lambda: two_layer_fat_tree(6, 4).without(switches=[1], cables=[0, 5]),
}


def graph_of(topology):
    graph = nx.MultiGraph()
    graph.add_nodes_from(range(topology.num_switches))
    graph.add_edges_from(ends for ends in topology.ends_C2.tolist() if ends[0] >= 0)
    return graph


@pytest.fixture(params=SMALL, ids=list(SMALL))
def topology(request):
    return SMALL[request.param]()


def test_distances_and_paths_are_those_of_networkx(topology):
    graph, hops_SS = graph_of(topology), distances(topology)
    known = dict(nx.all_pairs_shortest_path_length(graph))
    for a, b in itertools.product(range(topology.num_switches), repeat=2):
        assert hops_SS[a, b] == known[a].get(b, FAR)
    simple = nx.Graph(graph)
    doubled = nx.number_of_edges(simple) < nx.number_of_edges(graph)
    for source in range(0, topology.num_switches, 5):
        counts = path_counts(topology, source, hops_SS[source])
        for target in known[source]:
            listed = shortest_paths(topology, source, target, hops_SS)
            assert len(listed) == counts[target]
            assert len(np.unique(listed, axis=0)) == len(listed)
            if not doubled:
                assert len(list(nx.all_shortest_paths(simple, source, target))) == len(listed)
            for links in listed:
                # Link 2c leads along cable c, link 2c + 1 back.
                ends = [topology.ends_C2[link // 2][:: 1 - 2 * (link % 2)] for link in links]
                assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
                if len(links):
                    assert (ends[0][0], ends[-1][1]) == (source, target)


def test_cuts_are_those_of_networkx(topology):
    draw = np.random.default_rng(0)
    graph = nx.Graph()
    for a, b, _ in graph_of(topology).edges:
        before = graph.get_edge_data(a, b, {"capacity": 0})["capacity"]
        graph.add_edge(a, b, capacity=before + 1)
    for _ in range(4):
        order = draw.permutation(topology.num_switches)
        left, right = order[:2], order[2:5]
        for name, side in (("s", left), ("t", right)):
            graph.add_node(name)
            graph.add_edges_from((name, v) for v in side)
        expected = nx.minimum_cut_value(graph, "s", "t")
        graph.remove_nodes_from("st")
        assert min_cut(topology, left, right) == expected


@pytest.mark.parametrize("name", ["FT2", "FT3", "SF3", "DF"])
def test_the_narrowest_half_of_all_is_found(name):
    topology = SMALL[name]()
    edge = np.unique(topology.switch_E)
    if len(edge) == topology.num_switches:
        # Without switches in between a cut is the cables that cross.
        halves = list(itertools.combinations(range(1, len(edge)), len(edge) // 2))
        sides = np.zeros((len(halves), len(edge)), bool)
        np.put_along_axis(sides, np.array(halves), True, axis=1)
        narrowest = (sides[:, topology.ends_C2[:, 0]] != sides[:, topology.ends_C2[:, 1]]).sum(1)
        assert bisection(topology) == narrowest.min()
        return
    cuts = [
        min_cut(topology, np.array(half), np.setdiff1d(edge, half))
        for half in itertools.combinations(edge, len(edge) // 2)
    ]
    assert bisection(topology) == min(cuts)


def test_a_fat_tree_can_carry_half_its_endpoints_across():
    assert bisection(two_layer_fat_tree(16)) == 128 // 2
    assert bisection(three_layer_fat_tree(8)) == 128 // 2


@pytest.mark.parametrize(
    ("build", "source", "target", "paths"),
    [
        # Between leaves of two layers: over every spine; with few leaves, over pairs of cables.
        (two_layer_fat_tree, 0, 63, 32),
        (lambda: two_layer_fat_tree(64, 8), 0, 7, 4 * 8 * 8),
        # In three layers: inside a pod over its 32 switches, between pods over all 1,024 cores.
        (three_layer_fat_tree, 0, 31, 32),
        (three_layer_fat_tree, 0, 32, 1024),
    ],
    ids=["FT2", "FT2-8-leaves", "FT3-pod", "FT3-pods"],
)
def test_full_size_fat_trees_have_the_paths_of_their_closed_forms(build, source, target, paths):
    topology = build()
    hops_S = np.full(topology.num_switches, FAR, np.int8)
    hops_S[source], ring, hops = 0, np.array([source]), 0
    while len(ring):
        hops += 1
        near = topology.adjacency[0][ring]
        ring = np.unique(near[near >= 0])
        ring = ring[hops_S[ring] == FAR]
        hops_S[ring] = hops
    assert path_counts(topology, source, hops_S)[target] == paths


def test_a_line_of_switches_is_cut_by_one_cable():
    line = Topology(
        "line", 3, 10, np.arange(10, dtype=np.int32),
        np.stack((np.arange(9), np.arange(1, 10)), axis=1).astype(np.int32),
    )  # fmt: skip
    assert bisection(line) == 1
