"""Expanded and absorbed attention agree, the cache's size, and generated tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import training
from deepseek_jax.config import Yarn
from deepseek_jax.generate import _first, _next, decode, empty_cache, pick, prefill
from deepseek_jax.rope import frequencies
from tests.configs import TINY, compiled, make_run
from tests.oracle import weights

B, T, PROMPT = 2, 20, 7
PLAIN = dataclasses.replace(TINY, num_mtp=0)
CONFIGS = {
    "query-latent": PLAIN,
    "no-query-latent": dataclasses.replace(PLAIN, query_latent_dim=None),
    # Positions 8 to 19 lie beyond the original length.
    "yarn": dataclasses.replace(
        PLAIN, yarn=Yarn(factor=4.0, original_length=8, mscale=0.9, mscale_all_dim=0.7)
    ),
}


def make_model(config, params):
    return training.join(make_run(config), params, weights.make_biases(config, seed=0))


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def logits(request):
    """Logits [B, T, V] of one full pass, of decoding token by token, and of decoding at once."""
    config = CONFIGS[request.param]
    tokens_BT = jnp.asarray(weights.make_tokens(0, config.vocab_size, (B, T)))

    def compute(params):
        model = make_model(config, params)
        full_BTV, _ = model(tokens_BT)
        cache = empty_cache(config, B, T + 3, jnp.float32)
        first_BV, cache = prefill(model, tokens_BT[:, :PROMPT], cache)

        def one(cache, position):
            token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BT, position, 1, axis=1)
            start_B = jnp.full((B,), position, jnp.int32)
            logits_B1V, cache = decode(model, token_B1, cache, start_B)
            return cache, logits_B1V[:, 0]

        after, one_TBV = jax.lax.scan(one, cache, jnp.arange(PROMPT, T, dtype=jnp.int32))
        start_B = jnp.full((B,), PROMPT, jnp.int32)
        block_BTV, block_cache = decode(model, tokens_BT[:, PROMPT:], cache, start_B)
        return full_BTV, first_BV, jnp.moveaxis(one_TBV, 0, 1), block_BTV, after, block_cache

    params = weights.make_weights(config, seed=0)
    return jax.device_get(compiled(compute, params)(params))


def test_prefill_gives_the_logits_of_a_full_pass(logits, relative_error):
    full_BTV, first_BV, *_ = logits
    assert relative_error(first_BV, full_BTV[:, PROMPT - 1]) < 1e-4


def test_decoding_token_by_token_gives_the_logits_of_a_full_pass(logits, relative_error):
    full_BTV, _, one_BTV, *_ = logits
    for position in range(PROMPT, T):
        error = relative_error(one_BTV[:, position - PROMPT], full_BTV[:, position])
        assert error < 1e-4, f"{position=}"


def test_decoding_several_tokens_at_once_is_causal(logits, relative_error):
    full_BTV, _, _, block_BTV, *_ = logits
    assert relative_error(block_BTV, full_BTV[:, PROMPT:]) < 1e-4


def test_both_ways_leave_the_same_cache_and_nothing_behind_it(logits, relative_error):
    *_, after, block_cache = logits
    assert after.shape == (PLAIN.num_layers, B, T + 3, PLAIN.cache_dim)
    assert relative_error(after, block_cache) < 1e-4
    assert not after[:, :, T:].any() and after[:, :, :T].any(axis=-1).all()


def test_yarn_changes_the_logits():
    # Or the yarn case above would test nothing.
    plain, yarn = frequencies(PLAIN), frequencies(CONFIGS["yarn"])
    assert (yarn[-3:] < 0.3 * plain[-3:]).all()


# The cache.


def test_the_cache_of_v3_takes_70272_bytes_a_token():
    config = ds.configs.deepseek_v3()
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 1))
    assert cache.size * cache.dtype.itemsize == 70_272


def test_what_v3_caches_of_a_prompt_is_the_formula():
    config = ds.configs.deepseek_v3()
    model = nnx.eval_shape(lambda: ds.Model(config, precision="bf16", rngs=nnx.Rngs(0)))
    latents = lambda m, tokens: m.hidden(tokens, latents=True)[1].latent_LBTY
    latent_LBTY = jax.eval_shape(latents, model, jnp.zeros((1, 5), jnp.int32))
    assert latent_LBTY.size * latent_LBTY.dtype.itemsize == 5 * 70_272


# Tokens.


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(PLAIN, num_layers=2, num_dense_layers=0)
    return make_model(config, jax.tree.map(jnp.asarray, weights.make_weights(config, seed=0)))


@pytest.fixture(scope="module")
def prompt_BT():
    return jnp.asarray(weights.make_tokens(1, PLAIN.vocab_size, (B, 5)))


@pytest.fixture(scope="module")
def greedy(model, prompt_BT):
    """Greedy tokens, and how many programs `generate` compiled to find them."""
    before = programs()
    tokens_BN = ds.generate(model, prompt_BT, max_new_tokens=6)
    return tokens_BN, [after - b for after, b in zip(programs(), before, strict=True)]


def programs():
    return _first._cache_size(), _next._cache_size()


def test_greedy_tokens_are_the_most_likely_of_a_full_pass(model, prompt_BT, greedy):
    tokens_BN, _ = greedy
    assert tokens_BN.shape == (B, 6) and tokens_BN.dtype == jnp.int32
    whole_BT = jnp.concatenate((prompt_BT, tokens_BN), axis=1)
    logits_BTV, _ = compiled(lambda m, x: m(x), model, whole_BT)(model, whole_BT)
    np.testing.assert_array_equal(jnp.argmax(logits_BTV[:, 4:-1], axis=-1), tokens_BN)


def test_two_programs_are_compiled_for_any_number_of_tokens(greedy):
    _, new_programs = greedy
    assert new_programs == [1, 1]


def test_a_second_call_compiles_nothing_and_gives_the_same(model, prompt_BT, greedy):
    before = programs()
    again = ds.generate(model, prompt_BT, max_new_tokens=6)
    assert programs() == before
    np.testing.assert_array_equal(again, greedy[0])


def test_draws_follow_the_softmax_at_their_temperature():
    temperature, draws = 1.5, 4000
    logits_V = jnp.array([2.0, 1.0, 0.0, -1.0, 0.5])
    keys = jax.random.split(jax.random.key(0), draws)
    draw = jax.vmap(lambda key: pick(logits_V[None], temperature, key)[0])
    counts = np.bincount(np.asarray(draw(keys)), minlength=5)
    p = np.exp(np.asarray(logits_V) / temperature)
    expected = draws * p / p.sum()
    # 99.9 % of chi-square with 4 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 18.5


def test_temperature_0_is_the_most_likely_token():
    logits_BV = jnp.array([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    assert pick(logits_BV, 0.0, jax.random.key(0)).tolist() == [1, 0]


def test_draws_are_decided_by_the_key(model, prompt_BT):
    draw = lambda seed: np.asarray(
        ds.generate(model, prompt_BT, max_new_tokens=6, temperature=2.0, key=jax.random.key(seed))
    )
    first = draw(0)
    np.testing.assert_array_equal(first, draw(0))
    assert (first != draw(1)).any()
    assert ((0 <= first) & (first < PLAIN.vocab_size)).all()


@pytest.mark.parametrize(
    "prompt, changes, message",
    [
        ([[]], {}, r"prompt of shape \(1, 0\) must be \[B, T\] with B, T >= 1"),
        ([1, 2], {}, r"prompt of shape \(2,\) must be"),
        ([[1, 104]], {}, r"prompt token 104 is outside 0..103"),
        ([[1, -1]], {}, r"prompt token -1 is outside 0..103"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1] * 60], {"max_new_tokens": 5}, "60 tokens . max_new_tokens=5 exceeds max_length=64"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ([[1]], {"temperature": 1.0}, r"pass key=jax.random.key\(seed\)"),
    ],
    ids=["empty", "one-row", "large-id", "negative-id", "no-tokens", "too-long", "cold", "no-key"],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        ds.generate(model, np.asarray(prompt, np.int32), **{"max_new_tokens": 2, **changes})
