"""Experts on few tokens, read where they lie, against a loop over tokens and their experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import attention, block, experts_in_place, few_rows, latent_cache
from deepseek_jax.decoding import decode
from deepseek_jax.experts_in_place import (
    OfLayer,
    ffn_in_place,
    ffn_with_shared,
    reads_shared,
    suits,
)
from deepseek_jax.latent_cache import empty_cache
from deepseek_jax.layers import norm_for, norms_for, rms_norm
from deepseek_jax.linear import linear, linears
from pallas_kernels.mosaic import Target
from tests.configs import TINY

E, F, D, K = 6, 5, 7, 2


def operands(tokens: int):
    draw = np.random.default_rng(0).standard_normal
    weights = [draw(shape, np.float32) for shape in ((E, F, D), (E, F, D), (E, D, F))]
    ids = np.random.default_rng(1).permuted(np.tile(np.arange(E), (tokens, 1)), axis=1)[:, :K]
    return draw((tokens, D), np.float32), ids, draw((tokens, K), np.float32), weights


def one_by_one(x_TD, expert_TK, weight_TK, weights):
    y_TD = np.zeros_like(x_TD, np.float64)
    for t, x_D in enumerate(x_TD.astype(np.float64)):
        for expert, weight in zip(expert_TK[t], weight_TK[t], strict=True):
            gate, up, down = (w[expert].astype(np.float64) for w in weights)
            g_F = gate @ x_D
            y_TD[t] += weight * (down @ (g_F / (1 + np.exp(-g_F)) * (up @ x_D)))
    return y_TD


@pytest.mark.parametrize("tokens", [1, 2, 4], ids="T{}".format)  # 2, 4 and 8 choices of 6 experts
def test_few_tokens_get_what_their_experts_compute(tokens, relative_error):
    x_TD, expert_TK, weight_TK, weights = operands(tokens)
    y_TD = jax.jit(ffn_in_place)(x_TD, jnp.asarray(expert_TK), weight_TK, tuple(weights))
    assert relative_error(y_TD, one_by_one(x_TD, expert_TK, weight_TK, weights)) < 1e-6


@pytest.mark.parametrize("tokens", [2, 20], ids="T{}".format)  # blocks of one row, and of 8
def test_tokens_that_all_choose_the_same_experts_read_them_in_the_stack_of_layers(
    tokens, relative_error
):
    x_TD, _, weight_TK, weights = operands(tokens)
    expert_TK = np.tile(np.array([4, 1]), (tokens, 1))
    expected = one_by_one(x_TD, expert_TK, weight_TK, weights)
    # Other layers hold what would not stay unnoticed.
    stacks = [jnp.stack((np.full_like(w, np.nan), w, np.full_like(w, np.nan))) for w in weights]
    of_layer = tuple(OfLayer(stack, jnp.int32(1)) for stack in stacks)
    y_TD = jax.jit(ffn_in_place)(x_TD, expert_TK, weight_TK, of_layer)
    assert relative_error(y_TD, expected) < 1e-6


def test_many_tokens_are_dispatched():
    assert suits(1, 8, 256) and suits(16, 128, 256) and suits(16, 64, 32)
    assert not suits(65, 65 * 8, 256) and not suits(512, 4096, 64)


def test_only_decoding_reads_experts_in_place_a_pass_without_a_cache_sends_even_few_tokens(
    monkeypatch,
):
    model = nnx.eval_shape(lambda: ds.Model(TINY, rngs=nnx.Rngs(0)))

    def cached(model, tokens_BT):
        start_B = jnp.zeros((2,), jnp.int32)
        return decode(model, tokens_BT, empty_cache(TINY, 2, 64, "fp32"), start_B)[0]

    def in_place(program, length):
        read = []
        ffn = lambda *operands: read.append(operands) or ffn_in_place(*operands)
        monkeypatch.setattr(experts_in_place, "ffn_in_place", ffn)
        # A function of its own, or what was traced before would not be traced again.
        fresh = lambda *args: program(*args)
        jax.make_jaxpr(fresh)(model, jax.ShapeDtypeStruct((2, length), jnp.int32))
        return bool(read)

    plain = lambda model, tokens_BT: model(tokens_BT)[0]
    assert not in_place(plain, 1) and not in_place(plain, 4)
    assert in_place(cached, 1) and in_place(cached, 4)
    assert not in_place(cached, 33)  # 66 tokens


@pytest.mark.parametrize("signature", ["BTD,FD->BTF", "BTNU,DNU->BTD", "BTQ,NAQ->BTNA"])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_few_rows_are_products(signature, rows, relative_error, monkeypatch):
    sizes = dict(B=rows, T=1, D=7, F=5, N=2, U=3, Q=4, A=6)
    left, right, _ = signature.replace("->", ",").split(",")
    draw = np.random.default_rng(2).standard_normal
    x, w = (draw([sizes[letter] for letter in side], np.float32) for side in (left, right))
    expected = np.einsum(signature, x.astype(np.float64), w.astype(np.float64))
    monkeypatch.setattr(few_rows, "MOST_ROWS", 4)  # a weight of few elements counts as one
    assert few_rows.packs_weights(left, signature.partition("->")[2], x, w)
    assert relative_error(linear(signature, x, w), expected) < 1e-6
    assert relative_error(few_rows.sums(signature, x, w), expected) < 1e-6


# Few rows on an accelerator, where every small kernel costs as much as a product.


@pytest.fixture
def on_accelerator(monkeypatch):
    for module in (few_rows, experts_in_place, attention, latent_cache, block):
        monkeypatch.setattr(module, "target", lambda: Target("gpu", "an accelerator", 1))


@pytest.mark.parametrize("shape", [(1, 1, D), (2, 2, D), (5, 1, D)], ids="{0[0]}x{0[1]}".format)
def test_products_of_few_rows_are_scaled_by_their_norm_afterwards(
    shape, on_accelerator, relative_error
):
    draw = np.random.default_rng(3).standard_normal
    x_BTD, gain_D, w_FD = (draw(n, np.float32) for n in (shape, D, (F, D)))
    rows = norm_for(w_FD, jnp.asarray(x_BTD), jnp.asarray(gain_D), 1e-6, "BTD")
    assert isinstance(rows, few_rows.Scaled if shape[0] < 5 else jax.Array)
    expected = rms_norm(x_BTD, gain_D, 1e-6)
    if shape[0] < 5:
        assert relative_error(rows.x, expected) < 1e-6
    assert relative_error(linear("BTD,FD->BTF", rows, w_FD), expected @ w_FD.T) < 1e-6


def test_norms_of_rows_of_several_lengths_are_those_of_each(on_accelerator, relative_error):
    draw = np.random.default_rng(3).standard_normal
    pairs = [(draw((2, 1, n), np.float32), draw(n, np.float32)) for n in (D, 3, D + 4)]
    norms = [(gain, jnp.asarray(x), jnp.asarray(gain), "BTD") for x, gain in pairs]
    made = norms_for(*norms, eps=1e-3)
    for rows, (x, gain) in zip(made, pairs, strict=True):
        assert isinstance(rows, few_rows.Scaled)
        assert relative_error(rows.x, rms_norm(x, gain, 1e-3)) < 1e-6


def test_shared_experts_of_one_token_are_read_along_with_the_chosen(on_accelerator, relative_error):
    draw = np.random.default_rng(7).standard_normal
    x_TD, expert_TK, weight_TK, weights = operands(1)
    shared = [draw(shape, np.float32) for shape in ((2 * F, D), (2 * F, D), (D, 2 * F))]
    (x_1D,) = few_rows.normed((jnp.asarray(x_TD), jnp.ones(D)), eps=1e-6)
    assert reads_shared(x_1D, K, weights, shared)
    assert not reads_shared(x_1D, 3, weights, shared)  # no whole groups as wide as the shared
    assert not reads_shared(x_1D, 8, [np.zeros((16, F, D))] * 3, [np.zeros((F, D))] * 3)
    arrays = jax.tree.map(jnp.asarray, (expert_TK[0], weight_TK[0], weights, shared))
    y_1D = ffn_with_shared(x_1D, *arrays)
    x_TD = np.asarray(x_1D.x)
    # The shared experts as two more that are chosen with weight 1.
    halves = [shared[n].reshape(2, F, D) for n in (0, 1)]
    halves.append(shared[2].reshape(D, 2, F).swapaxes(0, 1))
    every = [np.concatenate(both) for both in zip(weights, halves, strict=True)]
    expert_TJ = np.concatenate((expert_TK, [[E, E + 1]]), axis=1)
    weight_TJ = np.concatenate((weight_TK, np.ones((1, 2))), axis=1)
    assert relative_error(y_1D, one_by_one(x_TD, expert_TJ, weight_TJ, every)) < 1e-6


def test_several_rows_multiply_weights_larger_than_the_cache_of_a_device(
    on_accelerator, monkeypatch, relative_error
):
    signature, draw = "BTD,FD->BTF", np.random.default_rng(3).standard_normal
    w_FD, gain_D = draw((F, D), np.float32), np.ones(D, np.float32)
    one, two = (jnp.asarray(draw((rows, 1, D), np.float32)) for rows in (1, 2))
    assert few_rows.is_summed(signature, two, w_FD)
    monkeypatch.setattr(few_rows, "CACHED_BYTES", w_FD.nbytes - 1)
    assert few_rows.is_summed(signature, one, w_FD)
    assert not few_rows.is_summed(signature, two, w_FD)
    product = linear(signature, norm_for(w_FD, two, gain_D, 1e-6, "BTD"), w_FD)
    assert relative_error(product, rms_norm(two, gain_D, 1e-6) @ w_FD.T) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_several_weights_that_few_rows_are_multiplied_with_are_summed_as_one(
    rows, on_accelerator, relative_error, monkeypatch
):
    draw = np.random.default_rng(3).standard_normal
    x_BTD, gain_D = draw((rows, 1, D), np.float32), draw(D, np.float32)
    w_FD, w_YD = (jnp.asarray(draw((n, D), np.float32)) for n in (F, 5))
    pair = ("BTD,FD->BTF", w_FD), ("BTD,YD->BTY", w_YD)
    normed = norm_for(w_FD, jnp.asarray(x_BTD), jnp.asarray(gain_D), 1e-6, "BTD")
    sums = lambda: str(jax.make_jaxpr(lambda: linears(normed, *pair))()).count("reduce_sum")
    # Many rows are products; two rows are products where a device keeps no weight so large.
    assert sums() == {1: 1, 2: 1, 5: 0}[rows]
    expected = rms_norm(x_BTD, gain_D, 1e-6)
    for y, (_, w) in zip(linears(normed, *pair), pair, strict=True):
        assert relative_error(y, expected @ w.T) < 1e-6
    monkeypatch.setattr(few_rows, "CACHED_BYTES", w_FD.nbytes)
    assert sums() == {1: 1, 2: 2, 5: 0}[rows]


def test_counting_places_finds_the_experts_of_a_top_k_equals_and_minus_infinity_included():
    score_RE = np.random.default_rng(6).integers(0, 5, (3, 1, 16)).astype(np.float32)
    biased_RE = np.where(np.arange(16) % 4 == 1, -np.inf, score_RE - 3.0)
    places, scores = few_rows.best(jnp.asarray(biased_RE), jnp.asarray(score_RE), 6)
    _, expected = jax.lax.top_k(biased_RE, 6)
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(score_RE, np.asarray(expected), 2))
    places, _ = few_rows.best(jnp.full((1, 1, 16), jnp.nan), jnp.asarray(score_RE[:1]), 6)
    assert (np.asarray(places) < 16).all()  # indices of weights, whatever they are


@pytest.mark.parametrize("rows", [1, 2], ids="T{}".format)
def test_attention_in_sums_is_attention_in_products(rows, relative_error):
    draw = np.random.default_rng(4).standard_normal
    N, S, Y = TINY.num_heads, 16, TINY.cache_dim
    q_BTNY, cache_BSY = draw((1, rows, N, Y), np.float32), draw((1, S, Y), np.float32)
    seen_BTS = np.arange(S)[None, None] <= 5 + np.arange(rows)[None, :, None]
    args = TINY, q_BTNY, cache_BSY, seen_BTS
    products, sums = attention.look_in_products(*args), attention.look_in_sums(*args)
    assert relative_error(sums, products) < 1e-6


@pytest.mark.parametrize("last", [3, 4, 7, 8, 15], ids="at{}".format)
def test_attention_on_a_part_of_the_cache_is_attention_on_all_of_it(last, relative_error):
    module, draw = attention.Attention(TINY, rngs=nnx.Rngs(0)), np.random.default_rng(7)
    cache, start_B = empty_cache(TINY, 2, 16, "fp32", layers=1).at(0), jnp.array([1, last])
    latent_BSY = draw.standard_normal((2, 16, TINY.cache_dim), np.float32)
    cache = cache.append(latent_BSY, jnp.zeros((2,), jnp.int32))
    q_BTNA = draw.standard_normal((2, 1, TINY.num_heads, TINY.query_key_dim), np.float32)
    queries = jnp.split(q_BTNA, [TINY.content_head_dim], axis=-1)
    part = attention.on_cache(module, *queries, cache, start_B)
    whole = attention.absorbed(module, *queries, latent_BSY, start_B)
    assert relative_error(part, whole) < 1e-6


@pytest.mark.parametrize("step", [1, 2], ids="T{}".format)
def test_one_text_as_an_accelerator_reads_it_has_the_hidden_states_of_a_full_pass(
    step, on_accelerator, relative_error
):
    model = ds.Model(TINY, rngs=nnx.Rngs(0))
    tokens_BT = np.random.default_rng(5).integers(0, TINY.vocab_size, (1, 6), np.int32)

    def both(model, tokens_BT):
        cache, hidden = empty_cache(TINY, 1, 8, "fp32"), []
        for t in range(0, 6, step):
            h_BTD, cache, _ = decode(
                model, tokens_BT[:, t : t + step], cache, jnp.full((1,), t, jnp.int32)
            )
            hidden.append(h_BTD)
        return jnp.concatenate(hidden, axis=1), model.hidden(tokens_BT)[0]

    in_steps, at_once = jax.jit(both)(model, tokens_BT)
    assert relative_error(in_steps, at_once) < 1e-5
