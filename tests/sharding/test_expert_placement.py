"""Expert placement: the published example, properties of any placement, and small optima."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.expert_placement import (
    balance,
    busiest_over_mean,
    device_load,
    improve,
    in_order,
    placement,
)

# The example of DeepSeek's balancer (EPLB): two layers, 12 experts in 4 groups on 2 nodes.
LOADS = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
     [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)  # fmt: skip
MAP = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
       [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]  # fmt: skip


def test_the_published_example():
    placed = balance(LOADS, places=16, devices=8, nodes=2, groups=4)
    assert placed.expert_LP.tolist() == MAP
    # Twice: two experts of each node, the busiest ones.
    assert placed.copies_LE[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placed.place_LEJ[0, 5].tolist() == [0, 2] and placed.place_LEJ[0, 6].tolist() == [1, -1]


@st.composite
def instances(draw):
    nodes, per_node, room = draw(st.tuples(*[st.integers(1, 4)] * 3))
    groups = nodes * draw(st.integers(1, 3)) if draw(st.booleans()) else 1
    devices = nodes * per_node
    most = devices * room // groups
    experts = groups * draw(st.integers(1, max(most, 1)))
    places = max(devices * room, -(-experts // devices) * devices)
    load = draw(
        st.lists(st.integers(0, 1000), min_size=2 * experts, max_size=2 * experts)
    )
    return np.array(load).reshape(2, experts), dict(
        places=places, devices=devices, nodes=nodes, groups=groups
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances())
def test_any_placement_holds_every_expert_and_knows_its_copies(instance):
    load_LE, sizes = instance
    devices, nodes, groups = sizes["devices"], sizes["nodes"], sizes["groups"]
    placed = balance(load_LE, **sizes)
    better = improve(load_LE, placed, devices=devices, nodes=1 if groups % nodes else nodes)
    for found in (placed, better):
        L, E = load_LE.shape
        assert found.expert_LP.shape == (L, sizes["places"])
        for layer, expert in itertools.product(range(L), range(E)):
            places = np.flatnonzero(found.expert_LP[layer] == expert)
            assert len(places) == found.copies_LE[layer, expert] >= 1
            listed = found.place_LEJ[layer, expert]
            assert listed[listed >= 0].tolist() == places.tolist()
        np.testing.assert_allclose(device_load(load_LE, found, devices).sum(1), load_LE.sum(1))
        if groups % nodes == 0:
            # A group's experts, copies too, lie on one node.
            node = np.arange(sizes["places"]) // (sizes["places"] // nodes)
            group = found.expert_LP // (E // groups)
            for layer, g in itertools.product(range(L), range(groups)):
                assert len(set(node[group[layer] == g].tolist())) == 1
    busiest = [busiest_over_mean(load_LE, found, devices) for found in (placed, better)]
    assert (busiest[1] <= busiest[0] * (1 + 1e-9)).all() and (busiest[1] >= 1 - 1e-9).all()


@pytest.mark.parametrize(
    ("experts", "places", "devices"), [(3, 4, 2), (4, 6, 3), (4, 6, 2), (5, 6, 3), (3, 6, 3)]
)
def test_small_instances_get_the_best_placement_there_is(experts, places, devices):
    draw = np.random.default_rng(experts * places)
    load_LE = draw.integers(1, 100, (12, experts))
    every_XP = np.array(list(itertools.product(range(experts), repeat=places)))
    every_XP = every_XP[[len(set(row)) == experts for row in every_XP.tolist()]]
    placed = balance(load_LE, places=places, devices=devices)
    found = device_load(load_LE, improve(load_LE, placed, devices=devices), devices).max(1)
    copies_XE = (every_XP[:, :, None] == np.arange(experts)).sum(1)
    for load_E, busiest in zip(load_LE, found, strict=True):
        share_XP = np.take_along_axis(load_E / copies_XE, every_XP, 1)
        best = share_XP.reshape(len(every_XP), devices, -1).sum(2).max(1).min()
        assert busiest == pytest.approx(best)


def test_copies_even_out_skewed_loads():
    # V3's prefill unit: 32 devices, 256 experts and 32 copies, on 1,000 random loads.
    load_LE = np.random.default_rng(0).lognormal(0, 0.7, (1000, 256))
    sizes = dict(places=288, devices=32)
    before = busiest_over_mean(load_LE, in_order(256, places=256, layers=1000), 32)
    after = busiest_over_mean(load_LE, balance(load_LE, **sizes, nodes=4, groups=8), 32)
    anywhere = busiest_over_mean(load_LE, balance(load_LE, **sizes), 32)
    assert (after < before).all() and (anywhere <= after).mean() > 0.95
    assert before.mean() > 1.5 and after.mean() < 1.1 and anywhere.mean() < 1.02


def test_exchanges_even_out_a_placement_and_stay_on_their_node():
    # 18, 10, 18 and 9 on four devices: two are equally busy, so no one exchange lowers the most.
    load_LE = np.array([[7.0, 6, 5, 4, 3, 3, 9, 8, 1, 2, 2, 5]])
    placed = placement(np.arange(12)[None], 12)
    better = improve(load_LE, placed, devices=4)
    assert busiest_over_mean(load_LE, placed, 4) > 1.2
    assert busiest_over_mean(load_LE, better, 4) < 1.1
    # On two nodes nothing crosses over.
    near = improve(load_LE, placed, devices=4, nodes=2)
    assert set(near.expert_LP[0, :6].tolist()) == set(range(6))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(places=11), ["places=11", "experts=12"]),
        (dict(places=18), ["places=18", "devices=8", "use 24"]),
        (dict(nodes=3), ["devices=8", "nodes=3"]),
        (dict(groups=5), ["experts=12", "groups=5"]),
        (dict(devices=0), ["devices=0"]),
        (dict(load_LE=LOADS[0]), ["(12,)", "[layers, experts]"]),
        (dict(load_LE=-LOADS), ["not negative"]),
        (dict(load_LE=LOADS * np.nan), ["finite"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_placements_that_cannot_be(changes, parts):
    sizes = dict(load_LE=LOADS, places=16, devices=8, nodes=2, groups=4) | changes
    with pytest.raises(ValueError) as error:
        balance(sizes.pop("load_LE"), **sizes)
    for part in parts:
        assert part in str(error.value)
