"""Expanded and absorbed attention agree, the cache's formats, and generated tokens, drafted or not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import latent_cache, training
from deepseek_jax.config import Yarn
from deepseek_jax.decoding import as_read, decode
from deepseek_jax.generate import (
    ONE_GRAPH,
    Stream,
    Text,
    _advance,
    _begin,
    _prefill,
    generate_with_report,
)
from deepseek_jax.latent_cache import empty_cache
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
        cache = empty_cache(config, B, T + 3, "fp32")
        start = lambda position: jnp.full((B,), position, jnp.int32)
        first_BTD, cache, _ = decode(model, tokens_BT[:, :PROMPT], cache, start(0))

        def one(cache, position):
            token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BT, position, 1, axis=1)
            hidden_B1D, cache, _ = decode(model, token_B1, cache, start(position))
            return cache, model.head(hidden_B1D)[:, 0]

        after, one_TBV = jax.lax.scan(one, cache, jnp.arange(PROMPT, T, dtype=jnp.int32))
        block_BTD, block_cache, _ = decode(model, tokens_BT[:, PROMPT:], cache, start(PROMPT))
        first_BTV, block_BTV = model.head(first_BTD), model.head(block_BTD)
        caches = after.latent_LBSY, block_cache.latent_LBSY
        return full_BTV, first_BTV[:, -1], jnp.moveaxis(one_TBV, 0, 1), block_BTV, *caches

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
    in_bf16, in_fp8 = (
        jax.eval_shape(lambda f=f: empty_cache(config, 1, 1, f)).num_bytes for f in ("bf16", "fp8")
    )
    assert in_bf16 == 70_272
    # 512 codes, 4 scales, 64 elements of the rotated key.
    assert in_fp8 == 61 * (512 + 4 * 4 + 64 * 2)


def test_what_v3_caches_of_a_prompt_is_the_formula():
    config = ds.configs.deepseek_v3()
    model = nnx.eval_shape(lambda: ds.Model(config, precision="bf16", rngs=nnx.Rngs(0)))
    latents = lambda m, tokens: m.hidden(tokens, latents=True)[1].latent_LBTY
    latent_LBTY = jax.eval_shape(latents, model, jnp.zeros((1, 5), jnp.int32))
    assert latent_LBTY.size * latent_LBTY.dtype.itemsize == 5 * 70_272


def test_tiles_of_the_cache_hold_three_bits_of_mantissa(relative_error):
    latent_BTC = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 300)), jnp.float32)
    codes, scale = latent_cache.encode(latent_BTC)
    assert scale.shape == (2, 3, 3)
    error = jnp.abs(latent_cache.decode(codes, scale) - latent_BTC)
    assert (error <= jnp.maximum(jnp.abs(latent_BTC) / 16, 0.01)).all()
    assert 0.005 < relative_error(latent_cache.decode(codes, scale), latent_BTC) < 0.04


# Tokens. A vocabulary so small that random MTP modules often guess right.

SMALL = dataclasses.replace(
    PLAIN, vocab_size=5, model_dim=16, num_layers=2, num_heads=2, content_head_dim=6,
    rotary_head_dim=4, value_head_dim=5, query_latent_dim=12, kv_latent_dim=8, dense_ffn_dim=20,
    expert_ffn_dim=6, num_experts=4, num_shared_experts=1, experts_per_token=2, num_groups=1,
    groups_per_token=1, num_mtp=2, max_length=128,
)  # fmt: skip
LENGTHS_B = np.array([9, 4, 1], np.int32)
NEW = 24


@pytest.fixture(scope="module")
def model():
    return make_model(SMALL, jax.tree.map(jnp.asarray, weights.make_weights(SMALL, seed=0)))


@pytest.fixture(scope="module")
def prompt_BT():
    return weights.make_tokens(1, SMALL.vocab_size, (3, 9))


@pytest.fixture(scope="module")
def full_pass(model):
    """Main and first MTP logits of texts of one length, by one program."""
    program = compiled(lambda m, x: (m(x, mtp=True)[0], m(x, mtp=True)[1].mtp_logits),
                       model, jnp.zeros((3, 9 + NEW), jnp.int32))  # fmt: skip
    return lambda tokens_BT: jax.tree.map(np.asarray, program(model, jnp.asarray(tokens_BT)))


def whole(prompt_BT, new_BN):
    """Each prompt and its continuation in one row, 0 behind."""
    rows = np.zeros((3, 9 + NEW), np.int32)
    for row, prompt, length, new in zip(rows, prompt_BT, LENGTHS_B, new_BN, strict=True):
        row[: length + NEW] = np.concatenate((prompt[:length], new))
    return rows


@pytest.fixture(scope="module")
def greedy(model, prompt_BT):
    """Greedy tokens of prompts of different lengths."""
    return ds.generate(model, prompt_BT, lengths_B=LENGTHS_B, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def drafted(model, prompt_BT):
    """The same with drafts, and the report."""
    return generate_with_report(
        model, prompt_BT, lengths_B=LENGTHS_B, max_new_tokens=NEW, draft=True
    )


def programs():
    return [_begin.cache_info().currsize, _prefill._cache_size(), _advance._cache_size()]


def test_greedy_tokens_are_the_most_likely_of_a_full_pass(prompt_BT, greedy, full_pass):
    assert greedy.shape == (3, NEW) and greedy.dtype == np.int32
    logits_BTV, _ = full_pass(whole(prompt_BT, greedy))
    for row, (length, logits_TV) in enumerate(zip(LENGTHS_B, logits_BTV, strict=True)):
        best = logits_TV[length - 1 : length - 1 + NEW].argmax(-1)
        np.testing.assert_array_equal(greedy[row], best)


def test_drafting_changes_no_token(greedy, drafted):
    np.testing.assert_array_equal(drafted[0], greedy)


def test_drafts_are_what_the_mtp_modules_predict_of_the_text(
    prompt_BT, greedy, drafted, full_pass
):
    # Drafts by the training pass of both modules over the final text: where the first is right the
    # second has seen the true tokens, so the steps that drafting takes can be told from it.
    _, (first_BTV, second_BTV) = full_pass(whole(prompt_BT, greedy))
    steps = accepted = 0
    for row, length in enumerate(LENGTHS_B):
        text = np.concatenate((prompt_BT[row, :length], greedy[row]))
        known = int(length)
        while known < len(text):
            guesses = [b[row, known - 2].argmax() for b in (first_BTV, second_BTV)]
            held = 0
            while held < 2 and known + held < len(text) and guesses[held] == text[known + held]:
                held += 1
            steps += 1
            accepted += held
            known += held + 1
    report = drafted[1]
    assert steps <= report.row_steps and accepted <= report.accepted + 2


def test_a_report_counts_steps_and_accepted_drafts(drafted):
    tokens, report = drafted
    assert report.draft_depth == 2 and report.tokens == tokens.size
    # Every step of a text adds one token beside the accepted ones; the last may be cut short.
    assert report.tokens <= report.row_steps + report.accepted <= report.tokens + 3
    assert report.accepted > 3 and report.tokens_per_step > 1.1
    assert report.acceptance == report.accepted / (2 * report.row_steps)
    layers = SMALL.num_layers + 2
    assert report.cache_bytes == layers * 3 * 256 * SMALL.cache_dim * 4


@pytest.mark.parametrize(
    ("asked", "size"), [(None, 4), ("fp32", 4), ("bf16", 2)], ids=["default", "fp32", "bf16"]
)
def test_on_a_cpu_a_cache_is_in_fp32_unless_another_is_asked_for(asked, size):
    model = nnx.jit(lambda: ds.Model(SMALL, precision="bf16", rngs=nnx.Rngs(0)))()
    text = Text(model, [[1, 2, 3]], max_new_tokens=1, cache_format=asked)
    assert text.report.cache_bytes == SMALL.num_layers * 256 * SMALL.cache_dim * size


def test_any_mix_of_lengths_needs_the_same_three_programs(model, prompt_BT, greedy):
    before = programs()
    draw = np.random.default_rng(0)
    for longest in (1, 5, 40, 100):
        prompts = draw.integers(0, SMALL.vocab_size, (3, longest))
        lengths = draw.integers(1, longest + 1, 3)
        ds.generate(model, prompts, lengths_B=lengths, max_new_tokens=int(draw.integers(1, 28)))
    assert programs() == before


def test_the_compiler_knows_the_options_of_decoding_on_gpus():
    assert jax.jit(jnp.negative, compiler_options=ONE_GRAPH)(1.0) == -1.0


def test_texts_do_not_depend_on_their_neighbours(model, prompt_BT, greedy):
    others = np.roll(prompt_BT, 1, axis=0)
    again = ds.generate(
        model, others, lengths_B=np.roll(LENGTHS_B, 1), max_new_tokens=NEW
    )
    np.testing.assert_array_equal(np.roll(again, -1, axis=0), greedy)


@pytest.mark.parametrize("draft", [False, True], ids=["plain", "drafted"])
def test_after_a_stop_comes_padding(model, prompt_BT, greedy, draft):
    stop = int(greedy[0, 5])
    tokens = ds.generate(
        model, prompt_BT, lengths_B=LENGTHS_B, max_new_tokens=NEW, stop=(stop,), pad=-7,
        draft=draft,
    )  # fmt: skip
    for row, unstopped in zip(tokens, greedy, strict=True):
        end = list(unstopped).index(stop) + 1 if stop in unstopped else NEW
        np.testing.assert_array_equal(row[:end], unstopped[:end])
        assert (row[end:] == -7).all()


@pytest.mark.parametrize("draft", [False, True], ids=["plain", "drafted"])
def test_streaming_yields_the_same_tokens_one_after_another(model, prompt_BT, greedy, draft):
    options = dict(lengths_B=LENGTHS_B, max_new_tokens=NEW, draft=draft)
    tokens = list(Stream(model, prompt_BT, **options))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), greedy)


def test_draws_are_decided_by_the_key_and_their_values_need_no_program(model, prompt_BT):
    def tokens(seed, temperature=2.0, **rules):
        return ds.generate(
            model, prompt_BT, lengths_B=LENGTHS_B, max_new_tokens=NEW, temperature=temperature,
            key=jax.random.key(seed), **rules,
        )  # fmt: skip

    first = tokens(0)
    before = programs()
    np.testing.assert_array_equal(first, tokens(0))
    assert (first != tokens(1)).any() and (first != tokens(0, temperature=0.5)).any()
    assert programs() == before
    assert ((0 <= first) & (first < SMALL.vocab_size)).all()


def test_top_1_is_greedy(model, prompt_BT, greedy):
    tokens = ds.generate(
        model, prompt_BT, lengths_B=LENGTHS_B, max_new_tokens=NEW, temperature=3.0, top_k=1,
        key=jax.random.key(0),
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, greedy)


@pytest.mark.parametrize(
    "prompt, changes, message",
    [
        ([[]], {}, r"prompt of shape \(1, 0\) must be \[B, T\] with B, T >= 1"),
        ([1, 2], {}, r"prompt of shape \(2,\) must be"),
        ([[1.0, 2.0]], {}, "prompt of dtype float64 must hold whole numbers"),
        ([[1, 5]], {}, r"prompt token 5 is outside 0..4"),
        ([[1, -1]], {}, r"prompt token -1 is outside 0..4"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1] * 124], {"max_new_tokens": 5}, "124 tokens . max_new_tokens=5 exceeds max_length=1"),
        ([[1, 2]], {"lengths_B": [3]}, r"lengths_B=\[3\] must be 1 whole numbers from 1 to 2"),
        ([[1, 2]], {"lengths_B": [1.5]}, r"lengths_B=\[1.5\] must be 1 whole numbers"),
        ([[1, 2]], {"lengths_B": [1, 2]}, r"lengths_B=\[1, 2\] must be 1 whole numbers"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens=2.0, pad=0 .* must be whole numbers"),
        ([[1]], {"pad": 2**31}, "pad=2147483648 .* must be whole numbers"),
        ([[1]], {"stop": (5,)}, "stop token 5 is outside 0..4"),
        ([[1]], {"stop": 3}, r"stop=3 must be a list of tokens: \[3\]"),
        ([[1]], {"stop": (2.7,)}, r"stop=\(2.7,\) must be whole numbers"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0 must be 0 .greedy. or at least"),
        ([[1]], {"temperature": 1.0, "key": 0}, "key=0 must be made by jax.random.key"),
        ([[1]], {"temperature": 1e-39, "key": jax.random.key(0)}, "temperature=1e-39 must be 0"),
        ([[1]], {"top_k": 2**40}, "top_k=1099511627776 must be a whole number"),
        ([[1]], {"top_p": 1e-50}, "top_p=1e-50 must be above 0"),
        ([[1]], {"temperature": 1.0}, r"pass key=jax.random.key\(seed\)"),
        ([[1]], {"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ([[1]], {"top_k": 2.7}, "top_k=2.7 must be a whole number"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ([[1]], {"min_p": 1.5}, "min_p=1.5 must be between 0 and 1"),
        ([[1]], {"cache_format": "int4"}, "unknown cache format 'int4'"),
    ],
)
def test_what_cannot_be_continued_is_refused(model, prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        ds.generate(model, np.asarray(prompt), **{"max_new_tokens": 2, **changes})


def test_drafting_needs_mtp_modules():
    config = dataclasses.replace(SMALL, num_mtp=0)
    plain = make_model(config, weights.make_weights(config, seed=0))
    with pytest.raises(ValueError, match="draft=True needs a model with MTP modules"):
        ds.generate(plain, np.ones((1, 2), np.int32), max_new_tokens=2, draft=True)


def test_on_a_cpu_bf16_weights_are_read_as_fp32_numbers():
    model = ds.Model(SMALL, precision="bf16", rngs=nnx.Rngs(0))
    read = as_read(model)
    assert read.precision.weights == read.precision.matmul == "fp32" and read.dtype == jnp.float32
    head_VD, wide_VD = model.head_VD[...], read.head_VD[...]
    assert wide_VD.dtype == jnp.float32 and not (head_VD == wide_VD).all()
    assert (head_VD.astype(jnp.bfloat16).astype(jnp.float32) == wide_VD).all()
    kept, router = model.moe.ffn.router_ED[...], read.moe.ffn.router_ED[...]
    assert (kept == router).all() and model.precision.matmul == "bf16"
