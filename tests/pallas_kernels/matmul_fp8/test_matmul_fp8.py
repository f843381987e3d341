"""Block-scaled products: values, gradients and errors against float64, lowering, refusals."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_scaled, tile_scaled
from pallas_kernels.matmul_fp8 import hopper, linear, matmul, weight_gradient
from pallas_kernels.quantize_fp8 import Blocks, Tiles, quantize_blocks, quantize_tiles, reference
from tests.conftest import LIMITS, relative_error
from tests.pallas_kernels.lowering import A100, HOPPER, TPU, kernels_in, on
from tests.pallas_kernels.numeric import float64, normal

ROOT = Path(__file__).resolve().parents[3]
M, N, K = 72, 272, 400
BF16, F32, F8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
shape_of = jax.ShapeDtypeStruct
# (N, K) of V3's dense products and their transposes, and short last blocks: 2112, 576, 10944.
SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (7168, 2112), (576, 2048)]
SHAPES += [(2048, 10944), (10944, 2048), (16, 32)]


def test_values_and_both_gradients():
    x_MK, dy_MN, w_NK = normal(0, (M, K), BF16), normal(1, (M, N), BF16), normal(2, (N, K))

    @jax.jit
    def step(x, w, dy):
        weight = quantize_blocks(w)
        y, backward = jax.vjp(lambda x, w: linear(x, weight, w), x, w)
        return y, *backward(dy)

    y_MN, dx_MK, dw_NK = step(x_MK, w_NK, dy_MN)
    x, dy, w = map(float64, (x_MK, dy_MN, w_NK))
    assert (y_MN.dtype, dx_MK.dtype, dw_NK.dtype) == (BF16, BF16, F32)
    assert relative_error(y_MN, x @ w.T) < LIMITS["fp8"].value
    assert relative_error(dx_MK, dy @ w) < LIMITS["fp8"].gradient
    assert relative_error(dw_NK, dy.T @ x) < LIMITS["fp8"].gradient


def test_an_accumulator_gets_itself_plus_the_gradient():
    x_MK, dy_MN, w_NK = normal(0, (M, K), BF16), normal(1, (M, N), BF16), normal(2, (N, K))
    weight, total_NK = jax.jit(quantize_blocks)(w_NK), normal(3, (N, K))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(w, accumulate):
        return jax.vjp(lambda w: linear(x_MK, weight, w, accumulate), w)[1](dy_MN)[0]

    right = total_NK + gradient(w_NK, False)
    np.testing.assert_allclose(gradient(total_NK, True), right, rtol=1e-5, atol=1e-5)


def test_micro_batches_accumulate_through_a_scan():
    x_bMK, w_NK = normal(0, (3, M, K), BF16), normal(2, (N, K))
    weight = quantize_blocks(w_NK)
    loss = lambda total, x: linear(x, weight, total, True).astype(F32).sum()
    step = lambda total, x: (jax.grad(loss)(total, x), None)
    total_NK, _ = jax.lax.scan(step, jnp.zeros((N, K)), x_bMK)
    right = float64(jnp.ones((3 * M, N))).T @ float64(x_bMK).reshape(-1, K)
    assert relative_error(total_NK, right) < LIMITS["fp8"].gradient


def exact(x: Tiles, w):
    """Float64 arithmetic on the quantised operands."""
    decode = lambda codes, scale: float64(reference.decode_tiles(codes, scale))
    return decode(*x) @ float64(reference.decode_blocks(w.codes[None], w.scale[None])[0]).T


@pytest.mark.parametrize("data, k", [("normal", 4096), ("outliers", 4096), ("uniform", 16384)])
def test_error_of_the_product_is_that_of_the_format(data, k):
    x_MK, w_NK = normal(0, (16, k)), normal(1, (32, k))
    if data == "uniform":
        x_MK, w_NK = jnp.abs(jnp.tanh(x_MK)), jnp.abs(jnp.tanh(w_NK))
    if data == "outliers":
        x_MK = x_MK.at[:, ::97].multiply(30)
    x, w = jax.jit(quantize_tiles)(x_MK), jax.jit(quantize_blocks)(w_NK)
    multiply = jax.jit(functools.partial(matmul, out_dtype=F32))
    found, right = multiply(x, w.codes, w.scale), exact(x, w)
    assert relative_error(found, right) < (1e-3 if data == "uniform" else 2e-4)
    original = float64(x_MK) @ float64(w_NK).T
    if data != "uniform":
        assert relative_error(found, original) <= 1.05 * relative_error(right, original)


def test_products_are_added_before_they_are_rounded():
    pairs = [(jax.jit(quantize_tiles)(normal(i, (M, K))), quantize_blocks(normal(9 + i, (N, K))))
             for i in range(2)]
    (a, b), (c, d) = pairs
    found = matmul(a, b.codes, b.scale, more=[(c, d.codes, d.scale)])
    right = exact(a, b) + exact(c, d)
    assert found.dtype == BF16
    assert relative_error(found, right) < 2e-3
    with pytest.raises(ValueError, match="cannot be added"):
        matmul(a, b.codes, b.scale, more=[(c, d.codes[:16], d.scale[:1])])


def test_nan_reaches_the_rows_that_it_belongs_to():
    x_MK, w_NK = normal(0, (M, K)).at[5, 7].set(jnp.nan), normal(1, (N, K))
    w = quantize_blocks(w_NK)
    y_MN = matmul(quantize_tiles(x_MK), w.codes, w.scale)
    np.testing.assert_array_equal(np.isnan(y_MN.astype(F32)).all(1), np.arange(M) == 5)
    np.testing.assert_array_equal(np.isnan(y_MN.astype(F32)).any(1), np.arange(M) == 5)


# The whole list only among the slow tests: default ones are the most different.
LOWERED = [(4096, shape) for shape in (*SHAPES[:2], *SHAPES[-3:])]
LOWERED += [(rows, SHAPES[0]) for rows in (1, 70, 128)] + [(64, (16, 32))]
LOWERED += [pytest.param(4096, shape, marks=pytest.mark.slow) for shape in SHAPES[2:-3]]
LOWERED += [pytest.param(64, shape, marks=pytest.mark.slow) for shape in SHAPES[:-1]]


@pytest.mark.parametrize("rows, shape", LOWERED, ids=str)
def test_forward_and_gradients_lower_for_hopper(rows, shape):
    n, k = shape
    up = lambda size, to: -(-size // to) * to

    def blocks(n, k):
        return shape_of((n, up(k, 128)), F8), shape_of((-(-n // 128), up(-(-k // 128), 32)), F32)

    def step(x, weight, w):
        loss = lambda x, w: linear(x, weight, w).astype(F32).sum()
        return jax.value_and_grad(loss, (0, 1))(x, w)

    weight = Blocks(*blocks(n, k), *blocks(k, n))
    with on(HOPPER):
        traced = jax.jit(step).trace(shape_of((rows, k), BF16), weight, shape_of((n, k), F32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Quantise x and dy, re-tile x, and three products.
    assert kernels_in(text) == 6


TILES = [
    block_scaled.Tiles(),
    block_scaled.Tiles(band=16),
    block_scaled.Tiles(store_columns=64, store_buffers=1),
    block_scaled.Tiles(stages=5, store_buffers=1),
    block_scaled.Tiles(warpgroups=2, stages=6, memory_registers=40),
    block_scaled.Tiles(row_tiles=5),
    block_scaled.Tiles(1, 16, 14, 16, 1, pair=False, memory_registers=40),
    block_scaled.Tiles(1, 32, 14, 32, 1, memory_registers=40),
    block_scaled.Tiles(2, 64, 8, pair=False, memory_registers=40),
    block_scaled.Tiles(2, 64, 8, pair=False, memory_registers=40, in_flight=3),
    block_scaled.Tiles(2, 128, 6, memory_registers=40, in_flight=2, round=8),
]


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_other_tiles_lower(tiles):
    for m, n, k in ((520, 2112, 512), (8, 16, 128)):
        shapes = (
            shape_of((m, k), F8),
            shape_of((k // 128, m), F32),
            shape_of((n, k), F8),
            shape_of((-(-n // 128), 32), F32),
        )
        call = functools.partial(hopper.matmul, tiles=tiles, cores=132, out_dtype=BF16)
        jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",))


GRADIENT_TILES = [
    hopper.GRADIENT_TILES,
    tile_scaled.Tiles(3, 128, 4, 32, 2, memory_registers=24),
    tile_scaled.Tiles(3, 128, 3, 32, 4, memory_registers=24),
    tile_scaled.Tiles(3, 128, 3, 128, 1, memory_registers=24, fetch_sums=True),
    tile_scaled.Tiles(2, 192, 4, 32, 2, memory_registers=24),
    tile_scaled.Tiles(2, 160, 4, 32, 1),
]


@pytest.mark.parametrize("tiles", GRADIENT_TILES, ids=str)
def test_other_tiles_of_weight_gradients_lower(tiles):
    n, k, tokens = 208, 144, 384
    y, x = shape_of((n, tokens), F8), shape_of((k, tokens), F8)
    y_scale, x_scale = shape_of((3, n), F32), shape_of((3, k), F32)
    call = functools.partial(hopper.weight_gradient, tiles=tiles, cores=132)
    for total in (None, shape_of((n, k), F32)):
        traced = jax.jit(call).trace(y, y_scale, x, x_scale, total)
        traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("slices, tiles", [(64, 22), (64, 24), (16, 6), (1, 1), (5, 5)])
def test_row_tiles_share_the_rows_evenly(slices, tiles):
    starts = block_scaled.starts_of(slices, tiles, jnp.arange(tiles + 1))
    assert starts[0] == 0 and starts[-1] == slices
    assert set(np.diff(starts)) <= {slices // tiles, slices // tiles + 1}


def test_row_tiles_balance_the_blocks():
    row_tiles = lambda n, k: hopper.balanced_row_tiles(4096, n, k, block_scaled.Tiles(), 132)
    # 5.3 tiles of 192 x 256 a pair of blocks: some would have 6, now 4 high ones and 2 low ones.
    assert row_tiles(4096, 7168) == 24
    # 32 tiles each already.
    assert row_tiles(24576, 1536) == 22
    # What runs at once exceeds the L2 cache: tiles must stay in step.
    assert row_tiles(7168, 16384) == 22


def test_few_rows_take_narrow_tiles_unless_the_sms_would_run_more_rounds():
    columns = lambda rows, n: hopper.tiles_of(rows, n, 512, 132).columns
    assert [columns(64, n) for n in (2112, 4096, 7168, 24576, 32768)] == [32, 32, 64, 64, 128]
    assert [columns(128, n) for n in (2112, 4096, 7168, 32768)] == [32, 32, 64, 128]


def test_odd_tiles_are_refused():
    with pytest.raises(ValueError, match="columns=48"):
        block_scaled.Tiles(columns=48)
    with pytest.raises(ValueError, match="warpgroups=4"):
        block_scaled.Tiles(warpgroups=4)
    with pytest.raises(ValueError, match="in_flight=5"):
        block_scaled.Tiles(in_flight=5)
    with pytest.raises(ValueError, match="round=1"):
        block_scaled.Tiles(in_flight=2, round=1)
    with pytest.raises(ValueError, match="columns=264"):
        tile_scaled.Tiles(columns=264)
    with pytest.raises(ValueError, match="whole tile in store buffers"):
        tile_scaled.Tiles(store_buffers=2, fetch_sums=True)


def call(m=8, n=16, k=128, a=F8, b=F8, a_scale=(1, 8), b_scale=(1, 32), **options):
    tiles = Tiles(jnp.zeros((m, k), a), jnp.ones(a_scale))
    return matmul(tiles, jnp.zeros((n, 128), b), jnp.ones(b_scale), **options)


BAD = {
    "a-dtype": (lambda: call(a=jnp.float8_e5m2), "codes of a"),
    "b-dtype": (lambda: call(b=BF16), "codes of b"),
    "n": (lambda: call(n=24), "multiple of 16"),
    "k": (lambda: call(k=144), "multiple of 128"),
    "k-differs": (lambda: call(k=256, a_scale=(2, 8)), "K=256"),
    "a-scale": (lambda: call(a_scale=(8, 1)), r"float32 \[1, 8\]"),
    "b-scale": (lambda: call(b_scale=(1, 1)), r"float32 \[1, 32\]"),
    "out": (lambda: call(out_dtype=jnp.float16), "bfloat16 or float32"),
    "implementation": (lambda: call(implementation="fast"), "must be one of"),
    "tokens": (
        lambda: weight_gradient(
            Tiles(jnp.zeros((16, 128), F8), jnp.ones((1, 16))),
            Tiles(jnp.zeros((16, 256), F8), jnp.ones((2, 16))),
        ),
        "tokens",
    ),
    "master": (
        lambda: linear(
            jnp.zeros((8, 16)), quantize_blocks(jnp.zeros((16, 16))), jnp.zeros((16, 8))
        ),
        "its master",
    ),
}


@pytest.mark.parametrize("bad, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax >= 0.11")
@pytest.mark.parametrize("case", [
    "dense", "in_flight", "dense_sum", "by_rows", "by_rows_sum", "by_contraction",
    "by_contraction_added", "by_contraction_slices",
])  # fmt: skip
def test_interpreted(case):
    # After an error the interpreter's process is of no use, so each case has its own.
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret.py"), case],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("device", [TPU, A100], ids=["tpu", "a100"])
def test_other_accelerators_are_refused_by_name(device):
    with on(device), pytest.raises(NotImplementedError, match=device.device_kind):
        jax.eval_shape(call)
