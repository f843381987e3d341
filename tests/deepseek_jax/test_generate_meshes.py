"""Generation on meshes: the tokens of one device, the cache cut over the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import training
from deepseek_jax.decoding import decode
from deepseek_jax.generate import Text
from deepseek_jax.latent_cache import empty_cache
from sharding import make_mesh
from sharding.placement import store_shardings, under_mesh
from tests.configs import TINY, make_run
from tests.oracle import weights

CONFIG = dataclasses.replace(
    TINY, num_layers=2, num_experts=16, num_groups=4, groups_per_token=2, experts_per_token=4,
    num_mtp=1, max_length=128,
)  # fmt: skip
MESHES = {"expert-8": {"expert": 8}, "expert-4-tensor-2": {"expert": 4, "tensor": 2}}
LENGTHS_B = np.array([9, 4, 1, 7, 8, 2, 9, 5], np.int32)


def make_model(mesh=None):
    trees = weights.make_weights(CONFIG, 0), weights.make_biases(CONFIG, 0)
    if mesh is None:
        place = lambda tree: jax.tree.map(jnp.asarray, tree)
    else:
        place = lambda tree: jax.device_put(tree, store_shardings(tree, mesh))
    return training.join(make_run(CONFIG), *map(place, trees))


@pytest.fixture(scope="module")
def prompt_BT():
    return weights.make_tokens(1, CONFIG.vocab_size, (8, 9))


@pytest.fixture(scope="module")
def one_device(prompt_BT):
    """64 greedy tokens of prompts of different lengths."""
    return ds.generate(make_model(), prompt_BT, lengths_B=LENGTHS_B, max_new_tokens=64)


@pytest.mark.slow
@pytest.mark.parametrize("draft", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_64_greedy_tokens_are_those_of_one_device(prompt_BT, one_device, axes, draft):
    tokens = ds.generate(
        make_model(make_mesh(**axes)), prompt_BT, lengths_B=LENGTHS_B, max_new_tokens=64,
        draft=draft,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, one_device)


@pytest.mark.parametrize(
    "axes", [pytest.param(MESHES["expert-8"], marks=pytest.mark.slow), MESHES["expert-4-tensor-2"]],
    ids=MESHES,
)  # fmt: skip
def test_logits_are_those_of_one_device(prompt_BT, axes, relative_error, limits):
    def logits(model, tokens_BT):
        cache = empty_cache(CONFIG, 8, 16, "fp32")
        start_B = jnp.zeros((8,), jnp.int32)
        hidden_BTD, _, lost = decode(model, tokens_BT, cache, start_B)
        return model.head(hidden_BTD), lost

    mesh = make_mesh(**axes)
    expected, _ = jax.jit(logits)(make_model(), prompt_BT)
    actual, lost = jax.jit(under_mesh(logits, mesh))(make_model(mesh), prompt_BT)
    assert relative_error(actual, expected) < limits["fp32"].value and lost == 0


def test_the_cache_is_cut_over_the_batch(prompt_BT):
    mesh = make_mesh(expert=4, tensor=2)
    text = Text(make_model(mesh), prompt_BT[:, :1], max_new_tokens=4, draft=True)
    for cache in text.state.cache, text.state.ahead.cache:
        array = cache.latent_LBSY
        assert array.sharding.shard_shape(array.shape)[1] == 2
