"""Formats and single products of the FP8 recipe against the recipe emulated in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax import fp8
from deepseek_jax.e5m6 import E5M6, decode_e5m6, encode_e5m6, to_e5m6
from deepseek_jax.linear import linear
from deepseek_jax.swiglu import gated_ffn, gated_ffn_fp8
from tests.deepseek_jax import fp8_emulation as emulation
from tests.oracle.reference import QUICK, float64

BF16 = jnp.bfloat16
RNG = np.random.default_rng(0)
# BF16 results: one rounding may fall the other way where the sums differ in their last digits.
ROUNDING = 2e-3


def normal(*shape, scale=1.0, dtype=BF16):
    return jnp.asarray(scale * RNG.normal(size=shape), dtype)


def pulled(fn, *args):
    """Value and cotangents; the last argument is the cotangent of the result."""

    def both(*args):
        y, pull = jax.vjp(fn, *args[:-1])
        return y, *pull(args[-1])

    return jax.device_get(jax.jit(both).lower(*args).compile(QUICK)(*args))


def emulated(fn, *args):
    """The same in float64."""
    with float64():
        return pulled(fn, *(jnp.asarray(np.asarray(a, np.float64)) for a in args))


# E5M6.


def e5m6_by_hand(x):
    """A tile of at most 128 numbers rounded to 6 bits of mantissa, ties to even, in numpy."""
    scale = 2.0 ** np.ceil(np.log2(max(np.abs(x).max(), 1e-30) / 448))
    mantissa, exponent = np.frexp(x / scale)
    return np.ldexp(np.round(mantissa * 128) / 128, exponent) * scale


def test_e5m6_rounds_to_six_bits_of_mantissa():
    x_TD = np.asarray(normal(5, 272, scale=3.0)).astype(np.float64)
    codes = encode_e5m6(jnp.asarray(x_TD, BF16))
    decoded = decode_e5m6(E5M6(None, *codes), x_TD.shape)
    expected = [[e5m6_by_hand(row[i : i + 128]) for i in range(0, 272, 128)] for row in x_TD]
    expected = np.stack([np.concatenate(row) for row in expected])
    assert (np.asarray(decoded, np.float64) == expected).all()
    assert (np.abs(expected - x_TD) > 0).any()


def test_e5m6_takes_twelve_bits_and_a_scale_for_128_elements():
    high, low, scale = encode_e5m6(normal(5, 272))
    assert (high.shape, low.shape, scale.shape) == ((5, 384), (5, 192), (5, 3))
    assert high.dtype == low.dtype == jnp.uint8
    assert (np.exp2(np.round(np.log2(scale))) == scale).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_e5m6_reports_what_is_not_finite(bad):
    x_TD = np.ones((2, 256), np.float32)
    x_TD[1, 200] = bad
    decoded = to_e5m6(jnp.asarray(x_TD, BF16).reshape(1, 2, 2, 128)).x.reshape(2, 256)
    assert np.isnan(decoded[1, 128:]).all()
    assert (decoded[0] == 1).all() and (decoded[1, :128] == 1).all()


def test_e5m6_of_zeros_is_zero():
    assert (to_e5m6(jnp.zeros((1, 2, 2, 16), BF16)).x == 0).all()


# What is kept by name.


def test_codes_that_remat_keeps_are_not_changed():
    # A float that remat keeps goes through reduce_precision, which knows no E4M3 above 240.
    def loss(x):
        tiles = fp8.quantize(x, "TD")
        codes, scale = fp8.kept_as("kept", tiles.codes, tiles.scale)
        kept = fp8.decode_tiles(codes, scale, 128).astype(jnp.float32)
        return jnp.sum(jnp.sin(x.astype(jnp.float32) + kept))

    policy = jax.checkpoint_policies.save_only_these_names("kept")
    x_TD = normal(3, 128)
    value = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))(x_TD)
    assert np.isfinite(value[0]) and np.isfinite(np.asarray(value[1], np.float32)).all()


# Weights.


@pytest.mark.parametrize(
    "letters, shape",
    [("NAQ", (2, 24, 288)), ("DNU", (272, 2, 48)), ("YD", (40, 272)), ("EDF", (3, 272, 320))],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_a_weight_is_quantised_in_blocks_of_its_matrix(letters, shape, relative_error):
    lead, outputs, _ = fp8.sides(letters)
    master = normal(*shape, scale=0.02, dtype=jnp.float32)
    weight = fp8.quantize_weight(master, letters)
    rows = np.prod(shape[len(lead) : len(lead) + len(outputs)])
    matrices = np.asarray(master, np.float64).reshape(-1, rows, master.size // rows // (
        shape[0] if lead else 1))
    with float64():
        expected = np.stack([emulation.blocks(jnp.asarray(m)) for m in matrices])
    assert relative_error(fp8.plain(weight, jnp.float32), expected.reshape(shape)) < 1e-6


def test_stacked_weights_are_those_of_each_layer():
    masters = normal(2, 272, 304, scale=0.02, dtype=jnp.float32)
    stacked = fp8.quantize_weights({"w_down_DF": masters})["w_down_DF"]
    one = fp8.quantize_weight(masters[1], "DF")
    for a, b in zip(jax.tree.leaves(stacked[1]), jax.tree.leaves(one), strict=True):
        assert (a.astype(jnp.float32) == b.astype(jnp.float32)).all()


def test_embedding_head_router_and_norms_stay_as_they_are():
    kept = {"embed_VD": jnp.ones((3, 5)), "head_VD": jnp.ones((3, 5)),
            "router_ED": jnp.ones((3, 5)), "norm_D": jnp.ones((5,))}
    after = fp8.quantize_weights(kept)
    assert all(after[name] is kept[name] for name in kept)


def test_inputs_of_a_wrong_width_are_refused_by_name():
    with pytest.raises(ValueError, match=r"multiple of 16 channels: ffn\.w_down_DF has 40"):
        fp8.quantize_weights({"ffn": {"w_down_DF": jnp.ones((32, 40))}})


# Products.


def weight_of(master, letters, accumulator=None):
    weight = fp8.quantize_weight(master, letters)
    if accumulator is None:
        return weight
    return dataclasses.replace(weight, target=accumulator, accumulate=True)


def vjp_of(signature, x, weight, dy):
    """y, dx, dw of a product with a quantised weight."""
    fn = lambda x, target: linear(signature, x, dataclasses.replace(weight, target=target))
    return pulled(fn, x, weight.target, dy)


@pytest.mark.parametrize("tokens", [70, 128], ids=["M70", "M128"])
def test_a_product_and_its_gradients_are_the_recipe(tokens, relative_error):
    x, w, dy = normal(1, tokens, 272), normal(304, 272, dtype=jnp.float32), normal(1, tokens, 304)
    actual = vjp_of("BTD,FD->BTF", x, weight_of(w, "FD"), dy)
    expected = emulated(lambda x, w: emulation.product("", x, w), x[0], w, dy[0])
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a.reshape(e.shape), e) < ROUNDING
    assert actual[0].dtype == actual[1].dtype == BF16 and actual[2].dtype == jnp.float32


def test_outputs_may_be_of_any_number(relative_error):
    x, w, dy = normal(2, 9, 272), normal(40, 272, dtype=jnp.float32), normal(2, 9, 40)
    actual = vjp_of("BTD,YD->BTY", x, weight_of(w, "YD"), dy)
    expected = emulated(
        lambda x, w: emulation.product("", x, w), x.reshape(18, 272), w, dy.reshape(18, 40)
    )
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a.reshape(e.shape), e) < ROUNDING


def test_after_attention_the_input_is_e5m6(relative_error):
    x, w, dy = normal(2, 9, 2, 48), normal(272, 2, 48, dtype=jnp.float32), normal(2, 9, 272)
    rounded = to_e5m6(x)
    weight = weight_of(w, "DNU")
    fn = lambda values, target: linear(
        "BTNU,DNU->BTD",
        dataclasses.replace(rounded, x=values),
        dataclasses.replace(weight, target=target),
    )
    actual = pulled(fn, rounded.x, w, dy)
    expected = emulated(
        lambda x, w: emulation.product("attention", x, w), x.reshape(18, 96), w.reshape(272, 96),
        dy.reshape(18, 272),
    )
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a.reshape(e.shape), e) < ROUNDING


def test_a_gradient_is_added_to_the_accumulator(relative_error):
    x, w, dy = normal(1, 70, 272), normal(304, 272, dtype=jnp.float32), normal(1, 70, 304)
    sums = normal(304, 272, scale=30.0, dtype=jnp.float32)
    _, _, alone = vjp_of("BTD,FD->BTF", x, weight_of(w, "FD"), dy)
    _, _, total = vjp_of("BTD,FD->BTF", x, weight_of(w, "FD", sums), dy)
    assert relative_error(total, sums + alone) < 1e-6


def test_swiglu_is_made_again_from_inputs_kept_in_fp8(relative_error):
    x, dy = normal(1, 70, 272), normal(1, 70, 272)
    masters = [normal(304, 272, dtype=jnp.float32, scale=0.1) for _ in range(2)]
    masters.append(normal(272, 304, dtype=jnp.float32))
    weights = [weight_of(w, letters) for w, letters in zip(masters, ("FD", "FD", "DF"),
                                                           strict=True)]

    def fn(x, *targets):
        given = [dataclasses.replace(w, target=t) for w, t in zip(weights, targets, strict=True)]
        return gated_ffn(fp8.quantize(x, "BTD"), *given)

    actual = pulled(fn, x, *masters, dy)
    expected = emulated(
        lambda x, gate, up, down: emulation.down(
            "", emulation.product("", x, gate), emulation.product("", x, up),
            jnp.ones((70, 1)), down,
        ),
        x[0], *masters, dy[0],
    )
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a.reshape(e.shape), e) < 2 * ROUNDING


# Experts: rows sorted by expert, each group from a multiple of 128 on.


@pytest.fixture(scope="module")
def experts():
    """Results for 3 experts with 70, 0 and 128 rows, padding poisoned, and those expected."""
    sizes, starts = np.array([70, 0, 128], np.int32), (0, 128, 128)
    x, dy, weight_M = normal(256, 272), normal(256, 272), normal(256, dtype=jnp.float32)
    masters = [normal(3, 320, 272, dtype=jnp.float32), normal(3, 320, 272, dtype=jnp.float32),
               normal(3, 272, 320, scale=0.05, dtype=jnp.float32)]
    real = np.concatenate([np.arange(70), np.arange(128, 256)])
    padding = np.setdiff1d(np.arange(256), real)
    tiles = fp8.quantize(x.at[padding].set(0), "TD", power_of_two=True)
    weights = [weight_of(w, letters) for w, letters in zip(masters, ("EFD", "EFD", "EDF"),
                                                           strict=True)]

    def run(x, weight_M, *targets):
        given = [dataclasses.replace(w, target=t) for w, t in zip(weights, targets, strict=True)]
        kept = dataclasses.replace(tiles, x=x)
        return gated_ffn_fp8(kept, tuple(given), weight_M, jnp.asarray(sizes))

    actual = pulled(run, x, weight_M, *masters, dy.at[padding].set(jnp.nan))
    expected = [
        emulated(
            lambda x, weight, gate, up, down: emulation.down(
                "experts",
                emulation.product("moe", x, gate),
                emulation.product("moe", x, up),
                weight[:, None],
                down,
            ),
            *(a[start : start + size] for a in (x, weight_M)),
            *(w[e] for w in masters),
            dy[start : start + size].astype(ml_dtypes.bfloat16),
        )
        if size
        else None
        for e, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    return real, actual, expected


def test_experts_and_their_gradients_are_the_recipe(experts, relative_error):
    real, actual, expected = experts
    for index in range(3):
        rows = np.concatenate([part[index] for part in expected if part is not None])
        assert relative_error(actual[index][real], rows) < 2 * ROUNDING, index
    for index in range(3, 6):
        for e in (0, 2):
            assert relative_error(actual[index][e], expected[e][index]) < 4 * ROUNDING


def test_an_expert_without_tokens_has_no_gradient(experts):
    _, actual, _ = experts
    assert all((gradient[1] == 0).all() for gradient in actual[3:])
