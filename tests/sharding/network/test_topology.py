"""Networks as built: counts, ports, and the algebra behind Slim Fly, held against closed forms."""

import networkx as nx
import numpy as np
import pytest

from sharding.network import slim_fly as mms
from sharding.network.dragonfly import dragonfly
from sharding.network.fat_tree import planes_of, three_layer_fat_tree, two_layer_fat_tree
from sharding.network.galois import field
from sharding.network.paths import bisection, diameter
from sharding.network.slim_fly import slim_fly
from sharding.network.topology import Topology, check_connected, components


def graph_of(topology):
    """The switches as a networkx multigraph."""
    graph = nx.MultiGraph()
    graph.add_nodes_from(range(topology.num_switches))
    graph.add_edges_from(ends for ends in topology.ends_C2.tolist() if ends[0] >= 0)
    return graph


def sizes(topology):
    return topology.num_endpoints, topology.num_switches, topology.num_cables


@pytest.mark.parametrize(
    ("build", "endpoints", "switches", "cables", "hops"),
    [
        (two_layer_fat_tree, 2_048, 96, 2_048, 2),
        (lambda: planes_of(two_layer_fat_tree()), 16_384, 768, 16_384, None),
        (three_layer_fat_tree, 65_536, 5_120, 131_072, 4),
        (lambda: slim_fly(27), 30_618, 1_458, 29_889, 2),
        (lambda: slim_fly(29), 35_322, 1_682, 36_163, 2),
        # Its diameter takes seconds and is a claim of its own.
        (lambda: dragonfly(groups=511), 261_632, 16_352, 384_272, None),
    ],
    ids=["FT2", "MPFT", "FT3", "SF27", "SF29", "DF511"],
)
def test_full_size(build, endpoints, switches, cables, hops):
    topology = build()
    assert sizes(topology) == (endpoints, switches, cables)
    used = np.bincount(topology.ends_C2.ravel(), minlength=switches)
    used += np.bincount(topology.switch_E, minlength=switches)
    assert used.max() <= topology.ports == 64
    assert len(np.unique(components(topology))) == (8 if "planes" in topology.name else 1)
    if hops is not None:
        assert diameter(check_connected(topology)) == hops


@pytest.mark.parametrize("k", [4, 6, 10])
def test_fat_trees_follow_their_formulas(k):
    assert sizes(two_layer_fat_tree(k)) == (k**2 // 2, 3 * k // 2, k**2 // 2)
    assert sizes(three_layer_fat_tree(k)) == (k**3 // 4, 5 * k**2 // 4, k**3 // 2)
    # Every port of every switch is used.
    for topology in (two_layer_fat_tree(k), three_layer_fat_tree(k)):
        used = np.bincount(topology.ends_C2.ravel(), minlength=topology.num_switches)
        used += np.bincount(topology.switch_E, minlength=topology.num_switches)
        assert (used == k).all()


@pytest.mark.parametrize(
    ("build", "switches", "cables", "cut"),
    [
        (lambda: two_layer_fat_tree(64, 8), 8 + 4, 256, 128),
        # One leaf against two: its four cables.
        (lambda: two_layer_fat_tree(8, 3), 3 + 2, 12, 4),
        (lambda: three_layer_fat_tree(8, 2), 8 + 8 + 4, 64, 16),
    ],
    ids=["8-leaves", "3-leaves", "2-pods"],
)
def test_small_fat_trees_have_as_few_switches_on_top_as_carry_all(build, switches, cables, cut):
    topology = build()
    assert (topology.num_switches, topology.num_cables) == (switches, cables)
    assert bisection(topology) == cut
    assert diameter(check_connected(topology)) == (4 if "three" in topology.name else 2)


def test_one_leaf_needs_no_spine():
    topology = two_layer_fat_tree(8, 1)
    assert sizes(topology) == (4, 1, 0) and diameter(topology) == 0


@pytest.mark.parametrize("q", [3, 4, 5, 7, 8, 9, 11, 13, 16, 17])
def test_slim_flies_are_regular_of_diameter_two(q):
    topology, counts = slim_fly(q), mms.counts(q)
    graph = nx.Graph(graph_of(topology))
    assert sizes(topology) == tuple(counts[x] for x in ("endpoints", "switches", "cables"))
    assert {degree for _, degree in graph.degree} == {2 * counts["cables"] // counts["switches"]}
    assert diameter(topology) == 2
    if q <= 5:
        assert nx.diameter(graph) == 2


def test_the_smallest_slim_fly_of_the_literature_is_the_hoffman_singleton_graph():
    # 50 switches, degree 7, diameter 2: the only Moore graph of that degree, of girth 5.
    graph = nx.Graph(graph_of(slim_fly(5)))
    assert nx.girth(graph) == 5
    assert nx.is_isomorphic(graph, nx.hoffman_singleton_graph())


@pytest.mark.parametrize("q", [2, 5, 8, 9, 27])
def test_fields_obey_their_axioms(q):
    gf = field(q)
    plus, times = gf.sum_QQ, gf.product_QQ
    nonzero = np.arange(1, q)
    assert sorted(gf.powers) == nonzero.tolist()
    for table, unit in ((plus, 0), (times, 1)):
        assert (table == table.T).all() and (table[unit] == np.arange(q)).all()
        assert (table[table[:, :, None], np.arange(q)] == table[:, table[:, :]]).all()
    assert (np.sort(plus, axis=1) == np.arange(q)).all()
    assert (np.sort(times[1:, 1:], axis=1) == nonzero).all()
    assert (times[:, plus] == plus[times[:, :, None], times[:, None, :]]).all()


@pytest.mark.parametrize("groups", [None, 5, 6, 8])
def test_dragonflies_join_all_groups_and_use_their_ports(groups):
    topology = dragonfly(per_switch=2, group_size=4, global_ports=2, groups=groups, ports=7)
    groups = groups or 9
    cables = topology.ends_C2 // 4
    across = cables[cables[:, 0] != cables[:, 1]]
    pairs = {tuple(sorted(pair)) for pair in across.tolist()}
    assert len(pairs) == groups * (groups - 1) // 2
    per_switch = np.bincount(topology.ends_C2[cables[:, 0] != cables[:, 1]].ravel())
    assert per_switch.max() == 2 and len(across) >= groups * 8 // 2 - groups / 2
    assert diameter(topology) <= 3
    if groups == 9:
        assert len(across) == len(pairs) and diameter(topology) == 3


def test_broken_parts_keep_their_numbers():
    whole = two_layer_fat_tree(4)
    broken = whole.without(switches=[4], cables=[0], endpoints=[3])
    assert broken.num_links == whole.num_links
    # Spine 4 is joined to all four leaves; cable 0 is one of those.
    assert broken.num_cables == whole.num_cables - 4
    assert (broken.switch_E >= 0).sum() == whole.num_endpoints - 1
    assert whole.num_cables == 8
    assert (whole.without(switches=[0]).switch_E[:2] == -1).all()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: slim_fly(28), ["q=28", "27 and 29"]),
        (lambda: slim_fly(6), ["q=6", "5 and 7"]),
        (lambda: slim_fly(29, per_switch=22), ["65 ports", "ports=64"]),
        (lambda: two_layer_fat_tree(7), ["ports=7", "even"]),
        (lambda: two_layer_fat_tree(8, 9), ["leaves=9", "ports=8"]),
        (lambda: dragonfly(groups=514), ["groups=514", "513"]),
        (lambda: check_connected(planes_of(two_layer_fat_tree(4), 2)), ["not connected", "8"]),
        (lambda: diameter(planes_of(two_layer_fat_tree(4), 2)), ["not connected"]),
        (lambda: two_layer_fat_tree(4).without(switches=[6]), ["switch 6", "0..5"]),
        (lambda: two_layer_fat_tree(4, 1).without(cables=[0]), ["no cable 0: it has none"]),
        (lambda: Topology("x", 4, 1, np.array([1]), np.zeros((0, 2), int)), ["switch 1"]),
        (lambda: field(12), ["q=12", "power of a prime"]),
    ],
    ids=lambda value: value[0].replace(" ", "-") if isinstance(value, list) else "",
)
def test_networks_that_cannot_be(make, parts):
    with pytest.raises(ValueError) as error:
        make()
    for part in parts:
        assert part in str(error.value)
