"""A model with redundant experts computes what it computes without them, gradients too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model import ready
from deepseek_jax.training import join
from sharding import make_mesh
from sharding.expert_placement import balance
from sharding.placement import Scheme, scope, store_shardings, under_mesh
from tests.configs import TINY, compiled, make_run, make_state

CONFIG = dataclasses.replace(
    TINY, num_layers=2, num_dense_layers=0, num_mtp=1, num_experts=8, num_groups=4,
    groups_per_token=2, experts_per_token=3, vocab_size=48,
)  # fmt: skip
LOAD_LE = np.random.RandomState(0).lognormal(0, 1.5, (3, 8))
TABLE = balance(LOAD_LE, places=16, devices=4).expert_LP
PLACED = tuple(map(tuple, TABLE.tolist()))


@pytest.fixture(scope="module")
def computed():
    """Logits and gradients without copies, and with them over two nodes in bounded buffers."""
    config = dataclasses.replace(CONFIG, num_layers=1, num_mtp=0, num_shared_experts=0)
    run = make_run(config, batch=8)
    state, mesh = make_state(run), make_mesh(fsdp=2, expert=4)
    tokens_BT = jnp.asarray(np.random.RandomState(1).randint(0, 48, (8, 7)))
    params = jax.device_put(state.params, store_shardings(state.params, mesh))

    def loss(params):
        logits_BTV, aux = join(run, params, state.biases)(tokens_BT)
        return jnp.sum(jnp.sin(logits_BTV)), (logits_BTV, aux.expert_counts_LE, aux.lost)

    def with_(scheme):
        run = under_mesh(jax.value_and_grad(loss, has_aux=True), mesh, scheme)
        (_, found), gradients = compiled(run, params)(params)
        return found, gradients

    return with_(Scheme()), with_(Scheme(expert_nodes=2, room=4.0, placement=PLACED[:1]))


def test_logits_and_gradients_are_those_without_copies(computed, relative_error):
    assert np.bincount(TABLE[0]).max() >= 3
    (plain, plain_gradients), (copied, copied_gradients) = computed
    assert int(copied[2]) == 0
    np.testing.assert_array_equal(plain[1], copied[1])
    assert relative_error(plain[0], copied[0]) < 1e-5
    pairs = jax.tree.map(relative_error, plain_gradients, copied_gradients)
    assert "w_down_EDF" in pairs["moe"]["ffn"] and max(jax.tree.leaves(pairs)) < 1e-5


def test_a_placed_model_stays_as_it_is():
    with scope(make_mesh(data=2, expert=4), Scheme(placement=PLACED)):

        def shapes():
            model = ds.Model(CONFIG, rngs=nnx.Rngs(0))
            once = ready(model)
            assert ready(once) is once and once is not model
            assert model.moe.ffn.place_EJ is None
            return once.moe.ffn.w_up_EFD[...], once.mtp.block.ffn.w_up_EFD[...]

        moe, mtp = jax.eval_shape(shapes)
    assert moe.shape == (2, 16, 24, 40) and mtp.shape == (1, 16, 24, 40)


def test_a_placement_of_another_model_is_refused():
    with scope(make_mesh(data=2, expert=4), Scheme(placement=PLACED[:2])):
        with pytest.raises(ValueError, match="3 layers of experts"):
            jax.eval_shape(lambda: ready(ds.Model(CONFIG, rngs=nnx.Rngs(0))))


def test_generation_under_another_placement_is_another_program():
    run = make_run(dataclasses.replace(CONFIG, num_layers=1, num_mtp=0))
    mesh, state = make_mesh(jax.devices()[:4], expert=4), make_state(run)
    params = jax.device_put(state.params, store_shardings(state.params, mesh))
    write = lambda: ds.generate(
        join(run, params, state.biases), np.ones((4, 1), int), max_new_tokens=2
    )
    with scope(mesh, Scheme(placement=PLACED[:1])):
        placed = write()
    with scope(mesh, Scheme()):
        np.testing.assert_array_equal(placed, write())
    with scope(mesh, Scheme(placement=PLACED[:2])):
        with pytest.raises(ValueError, match="1 layers of experts"):
            write()
