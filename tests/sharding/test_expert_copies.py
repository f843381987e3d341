"""Redundant experts: choices dealt out evenly, weights brought and gradients added up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import make_mesh
from sharding.expert_copies import check_placement, copy_weights, deal, places_of
from sharding.expert_parallel import plan_path
from sharding.expert_placement import balance, device_load, device_rows, placement
from sharding.placement import Scheme, under_mesh

E, PLACES, DEVICES, L, K = 16, 24, 8, 3, 4
RNG = np.random.RandomState(0)
# Skewed loads, so that some experts have four copies.
TABLE = balance(RNG.lognormal(0, 1.5, (L, E)), places=PLACES, devices=DEVICES).expert_LP


def skewed_choices(tokens):
    """K different experts a token, some much more often than others."""
    chance = RNG.lognormal(0, 1.0, E)
    rows = [RNG.choice(E, K, replace=False, p=chance / chance.sum()) for _ in range(tokens)]
    return np.asarray(rows, np.int32)


@pytest.mark.parametrize("first", [0, 3])
def test_copies_of_an_expert_take_its_choices_in_turn(first):
    expert_TK, place_EJ = skewed_choices(50), places_of(TABLE[:1], E)[0]
    place_TK = np.asarray(deal(jnp.asarray(expert_TK), jnp.asarray(place_EJ), first=first))
    np.testing.assert_array_equal(TABLE[0][place_TK], expert_TK)
    for expert in range(E):
        copies = place_EJ[expert][place_EJ[expert] >= 0]
        found = place_TK[expert_TK == expert]
        turns = (first + np.arange(len(found))) % len(copies)
        np.testing.assert_array_equal(found, copies[turns])


@pytest.mark.parametrize("scheme", [
    Scheme(), Scheme(expert_nodes=2), Scheme(expert_nodes=4, room=3.0)
], ids=["one-hop", "two-hops", "two-hops-bounded"])  # fmt: skip
def test_rows_of_devices_are_those_predicted(scheme):
    tokens = 64
    expert_TK = skewed_choices(DEVICES * tokens)
    counts_SE = np.stack([np.bincount(part.ravel(), minlength=E)
                          for part in np.split(expert_TK, DEVICES)])
    table = balance(counts_SE.sum(0)[None], places=PLACES, devices=DEVICES).expert_LP
    place_EJ = jnp.asarray(places_of(table, E)[0])

    def rows(expert_TK):
        place_TK = deal(expert_TK, place_EJ, first=jax.lax.axis_index("expert"))
        path = plan_path(place_TK, PLACES, 1, held=PLACES // DEVICES)
        return jnp.sum(path.rows.group_sizes_E)[None], jnp.asarray(path.lost)[None]

    mesh, each = make_mesh(expert=DEVICES), P("expert")
    mapped = jax.shard_map(rows, mesh=mesh, in_specs=each, out_specs=each)
    step = jax.jit(under_mesh(mapped, mesh, scheme))
    found, lost = map(np.asarray, step(jnp.asarray(expert_TK)))
    assert not lost.any()
    np.testing.assert_array_equal(found, device_rows(counts_SE, table[0], DEVICES))
    # And those that the balancer weighs, but for the fraction of a row a sender and place.
    shares = device_load(counts_SE.sum(0)[None], placement(table, E), DEVICES)[0]
    assert np.abs(found - shares).max() < PLACES / 2
    in_order = counts_SE.sum(0).reshape(DEVICES, -1).sum(1)
    assert in_order.max() > 1.3 * in_order.mean() and found.max() < 1.1 * found.mean()


def test_copies_have_the_weights_of_their_expert_and_add_up_its_gradients():
    w_LEFD = jnp.asarray(RNG.randn(L, E, 6, 4), jnp.float32)
    c_LPFD = jnp.asarray(RNG.randn(L, PLACES, 6, 4), jnp.float32)
    mesh = make_mesh(fsdp=2, expert=4)

    def loss(w_LEFD):
        w_LPFD = copy_weights(w_LEFD, TABLE)
        return jnp.sum(w_LPFD * c_LPFD), w_LPFD

    both = jax.jit(under_mesh(jax.value_and_grad(loss, has_aux=True), mesh))
    held = NamedSharding(mesh, P(None, "expert", None, "fsdp"))
    (_, w_LPFD), g_LEFD = both(jax.device_put(w_LEFD, held))
    layers = np.arange(L)[:, None]
    np.testing.assert_array_equal(w_LPFD, np.asarray(w_LEFD)[layers, TABLE])
    expected = np.zeros(w_LEFD.shape)
    np.add.at(expected, (layers, TABLE), np.asarray(c_LPFD, np.float64))
    np.testing.assert_allclose(g_LEFD, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change, parts", [
    (dict(layers=2), ["(3, 24)", "2 layers"]),
    (dict(devices=5), ["16 experts in 24 places", "not 5"]),
    (dict(devices=1), ["above 1", "not 1"]),
    (dict(experts=32), ["no place for expert 16 of 32"]),
    (dict(experts=8), ["names other experts of 8"]),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_placements_that_do_not_fit_are_refused(change, parts):
    with pytest.raises(ValueError) as error:
        check_placement(TABLE, **dict(layers=L, experts=E, devices=DEVICES) | change)
    for part in parts:
        assert part in str(error.value)
