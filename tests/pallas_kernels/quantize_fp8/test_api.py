"""FP8 codes and scales against float64: formats, edges, what is refused."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize_fp8 import (
    Tiles,
    quantize_blocks,
    quantize_tiles,
    reference,
    retile,
    rms_norm_tiles,
    swiglu_gradient_tiles,
    swiglu_tiles,
)
from tests.conftest import relative_error
from tests.pallas_kernels.lowering import A100, TPU, on
from tests.pallas_kernels.numeric import float64, normal

M, K = 70, 208
EDGES = [(70, 208), (1, 16), (130, 128), (128, 272)]


def decoded(codes, scale):
    """Values in float64, the padding of the contraction included."""
    return float64(codes) * np.repeat(float64(scale)[:, : codes.shape[0]].T, 128, axis=1)


def expected_tiles(x_MK, power_of_two=False):
    """Codes and scales by loops over tiles in numpy."""
    x = np.asarray(x_MK).astype(np.float32)
    blocks = -(-x.shape[1] // 128)
    codes = np.zeros((x.shape[0], blocks * 128), ml_dtypes.float8_e4m3fn)
    scales = np.zeros((blocks, x.shape[0]), np.float32)
    for row in range(x.shape[0]):
        for block in range(blocks):
            tile = x[row, block * 128 : (block + 1) * 128]
            scale = np.float32(max(np.abs(tile).max(), np.float32(1e-30))) * np.float32(1 / 448)
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            scales[block, row] = scale
            values = np.clip(tile * (np.float32(1) / scale), -448, 448)
            codes[row, block * 128 : block * 128 + tile.size] = values
    return codes, scales


@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32-scales", "power-of-two"])
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_codes_and_scales_of_tiles(shape, power_of_two):
    x_MK = normal(0, shape, jnp.bfloat16) * jnp.exp(normal(1, (shape[0], 1), jnp.bfloat16))
    both = functools.partial(quantize_tiles, by="both", power_of_two=power_of_two)
    rows, columns = jax.jit(both)(x_MK)
    for found, operand in ((rows, x_MK), (columns, x_MK.T)):
        codes, scales = expected_tiles(operand, power_of_two)
        np.testing.assert_array_equal(float64(found.codes), codes.astype(np.float64))
        np.testing.assert_array_equal(found.scale[:, : scales.shape[1]], scales)
        assert found.scale.shape[1] % 4 == 0
        assert relative_error(decoded(*found)[:, : operand.shape[1]], float64(operand)) < 0.04


def test_power_of_two_scales_are_the_next_power():
    scale = reference.scale_of(jnp.array([448.0, 449.0, 224.0]), True)
    np.testing.assert_array_equal(scale, [1, 2, 0.5])


def test_one_layout_alone_is_the_same():
    x_MK = normal(0, (M, K), jnp.bfloat16)
    rows, columns = quantize_tiles(x_MK, by="both")
    for by, right in (("rows", rows), ("columns", columns)):
        jax.tree.map(np.testing.assert_array_equal, quantize_tiles(x_MK, by=by), right)


def test_blocks_share_codes_with_their_transpose():
    w_GNK = normal(0, (2, 144, 272))
    w = jax.jit(quantize_blocks)(w_GNK)
    np.testing.assert_array_equal(
        float64(w.codes)[:, :144, :272], float64(w.transposed)[:, :272, :144].swapaxes(1, 2)
    )
    np.testing.assert_array_equal(
        w.scale[:, :2, :3], np.swapaxes(w.transposed_scale[:, :3, :2], 1, 2)
    )
    assert w.codes.shape == (2, 144, 384) and w.transposed.shape == (2, 272, 256)
    assert w.scale.shape == (2, 2, 32) and w.transposed_scale.shape == (2, 3, 32)
    amax = np.abs(np.asarray(w_GNK))[0, :128, 128:256].max()
    np.testing.assert_allclose(w.scale[0, 0, 1], amax / 448, rtol=1e-6)
    one = quantize_blocks(w_GNK[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1]), one, w)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_makes_its_scale_nan(poison):
    x_MK = normal(0, (M, K), jnp.bfloat16).at[3, 150].set(poison)
    rows, columns = jax.jit(functools.partial(quantize_tiles, by="both"))(x_MK)
    bad_kM = np.zeros(rows.scale.shape, bool)
    bad_kM[1, 3] = True
    np.testing.assert_array_equal(np.isnan(rows.scale), bad_kM)
    bad_mK = np.zeros(columns.scale.shape, bool)
    bad_mK[0, 150] = True
    np.testing.assert_array_equal(np.isnan(columns.scale), bad_mK)
    w = jax.jit(quantize_blocks)(x_MK[:64])
    assert np.isnan(w.scale[0, 1]) and np.isfinite(w.scale[0, 0])


def test_zeros_and_tiny_values_have_finite_scales():
    x_MK = jnp.full((8, 128), 1e-36).at[0].set(0)
    found = quantize_tiles(x_MK)
    np.testing.assert_allclose(found.scale, 1e-30 / 448, rtol=1e-6)
    assert not np.any(float64(found.codes))


def test_small_values_keep_their_digits():
    # As gradients of a mean over very many tokens are.
    x_MK = normal(0, (8, 128), jnp.bfloat16)
    found, small = quantize_tiles(x_MK), quantize_tiles(x_MK * jnp.bfloat16(2.0**-80))
    np.testing.assert_array_equal(float64(small.codes), float64(found.codes))
    np.testing.assert_array_equal(small.scale, found.scale * 2.0**-80)


def test_rows_beyond_the_counts_are_zeros_whatever_they_hold():
    counts_m = jnp.array([5, 100], jnp.int32)
    real_M = np.arange(256) % 128 < np.repeat(counts_m, 128)
    x_MK = normal(0, (256, K), jnp.bfloat16)
    zeroed = jnp.where(real_M[:, None], x_MK, 0)
    poisoned = jnp.where(real_M[:, None], x_MK, jnp.nan)
    both = jax.jit(functools.partial(quantize_tiles, by="both"))
    again = jax.jit(functools.partial(retile, width=K))
    right = both(zeroed)
    found = both(poisoned, counts_m=counts_m)
    jax.tree.map(np.testing.assert_array_equal, found, right)
    turned = again(both(poisoned)[0], counts_m=counts_m)
    jax.tree.map(np.testing.assert_array_equal, turned, again(right[0]))


def test_retiling_quantises_the_decoded_values():
    x_MK = normal(0, (M, K), jnp.bfloat16)
    rows = quantize_tiles(x_MK)
    found = retile(rows, K)
    values_MK = reference.decode_tiles(*rows)[:, :K]
    jax.tree.map(np.testing.assert_array_equal, found, quantize_tiles(values_MK, by="columns"))
    assert relative_error(decoded(*found)[:, :M], float64(x_MK).T) < 0.05


def test_fused_forms_are_the_quantised_composition():
    x_MK, up_MK = normal(0, (M, K), jnp.bfloat16), normal(1, (M, K), jnp.bfloat16)
    gain_K, weight_M = normal(2, (K,)), normal(3, (M,))
    x, up = float64(x_MK), float64(up_MK)
    norm = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * float64(gain_K)
    product = x / (1 + np.exp(-x)) * up * float64(weight_M)[:, None]
    for by in ("rows", "columns"):
        turn = (lambda a: a.T) if by == "columns" else (lambda a: a)
        cut = lambda found, right: decoded(*found)[:, : right.shape[1]]
        found = rms_norm_tiles(x_MK, gain_K, epsilon=1e-6, by=by)
        assert relative_error(cut(found, turn(norm)), turn(norm)) < 0.03
        found = swiglu_tiles(x_MK, up_MK, weight_M, by=by)
        assert relative_error(cut(found, turn(product)), turn(product)) < 0.03


def test_swiglu_that_keeps_its_inputs_returns_them_as_they_are_quantised_alone():
    gate_MK, up_MK = normal(0, (M, K), jnp.bfloat16), normal(1, (M, K), jnp.bfloat16)
    weight_M, counts_m = jnp.linspace(0.1, 2, M), np.array([50], np.int32)
    options = dict(counts_m=counts_m, power_of_two=True)
    found = swiglu_tiles(gate_MK, up_MK, weight_M, keep=True, **options)
    right = (
        swiglu_tiles(gate_MK, up_MK, weight_M, **options),
        quantize_tiles(gate_MK, **options),
        quantize_tiles(up_MK, **options),
    )
    jax.tree.map(np.testing.assert_array_equal, found, right)


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no-weights"])
def test_swiglu_backward_gives_the_gradients_and_the_product_again(weighted):
    counts_m = np.array([50, 2], np.int32)[: -(-M // 128)]
    real_MK = (np.arange(M) % 128 < counts_m.repeat(128)[:M])[:, None]
    gate_MK, up_MK, dy_MK = (normal(i, (M, K), jnp.bfloat16) for i in range(3))
    weight_M = jnp.linspace(0.1, 2, M) if weighted else None
    gate, up = (quantize_tiles(x, counts_m=counts_m) for x in (gate_MK, up_MK))
    poisoned = jnp.where(real_MK, dy_MK, jnp.nan)
    found = jax.jit(swiglu_gradient_tiles)(gate, up, poisoned, weight_M, counts_m=counts_m)
    g, u = (decoded(*x)[:, :K] for x in (gate, up))
    dy, w = float64(dy_MK) * real_MK, float64(weight_M)[:, None] if weighted else 1.0
    s = 1 / (1 + np.exp(-g))
    right = {
        "gate": dy * w * u * s * (1 + g * (1 - s)),
        "up": dy * w * g * s,
        "product": g * s * u * w,
    }
    for name in ("gate", "up"):
        assert relative_error(decoded(*getattr(found, name))[:, :K], right[name]) < 0.03
    for name, x_MK in right.items():
        columns = decoded(*getattr(found, f"{name}_columns"))[:, :M]
        assert relative_error(columns, x_MK.T) < 0.03
    if weighted:
        assert relative_error(found.weight_M, (dy * g * s * u).sum(axis=1)) < 1e-5
    else:
        assert found.weight_M is None


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


BAD = {
    "width": (lambda: quantize_tiles(zeros(4, 24)), "multiple of 16"),
    "dtype": (lambda: quantize_tiles(zeros(4, 16, dtype=jnp.float16)), "float32 or bfloat16"),
    "rank": (lambda: quantize_tiles(zeros(2, 4, 16)), r"\[M, K\]"),
    "by": (lambda: quantize_tiles(zeros(4, 16), by="row"), "by='row'"),
    "implementation": (lambda: quantize_tiles(zeros(4, 16), implementation="fast"), "one of"),
    "counts": (
        lambda: quantize_tiles(zeros(4, 16), counts_m=jnp.zeros(2, jnp.int32)),
        r"int32 \[1\]",
    ),
    "gain": (lambda: rms_norm_tiles(zeros(4, 16), zeros(32), epsilon=1e-6), "gain_K.shape"),
    "up": (lambda: swiglu_tiles(zeros(4, 16), zeros(4, 32)), "differ"),
    "weight": (lambda: swiglu_tiles(zeros(4, 16), zeros(4, 16), zeros(3)), "weight_M.shape"),
    "keep": (lambda: swiglu_tiles(zeros(4, 16), zeros(4, 16), by="both", keep=True), "by='both'"),
    "backward-shape": (
        lambda: swiglu_gradient_tiles(*[quantize_tiles(zeros(4, 32))] * 2, zeros(4, 144)),
        "dy is",
    ),
    "backward-weight": (
        lambda: swiglu_gradient_tiles(*[quantize_tiles(zeros(4, 32))] * 2, zeros(4, 32), zeros(3)),
        "weight_M.shape",
    ),
    "block-rank": (lambda: quantize_blocks(zeros(16)), r"\[N, K\]"),
    "block-width": (lambda: quantize_blocks(zeros(24, 16)), "24 to a multiple of 16"),
    "retile-scale": (
        lambda: retile(
            Tiles(zeros(4, 128, dtype=jnp.float8_e4m3fn), zeros(2, 4, dtype=jnp.float32)), 16
        ),
        r"float32 \[1, 4\]",
    ),
    "retile-width": (lambda: retile(quantize_tiles(zeros(4, 16)), 144), "width=144"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", [TPU, A100], ids=["tpu", "a100"])
def test_other_accelerators_are_refused_by_name(device):
    x = zeros(4, 16)
    with on(device), pytest.raises(NotImplementedError, match=device.device_kind):
        jax.eval_shape(quantize_tiles, x)
    with on(device):
        jax.eval_shape(functools.partial(quantize_tiles, implementation="reference"), x)
