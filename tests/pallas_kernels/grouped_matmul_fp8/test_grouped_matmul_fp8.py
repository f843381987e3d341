"""Experts' FP8 products: reference against float64, padding, groups, lowering, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul_fp8 import grouped_linear, hopper
from pallas_kernels.quantize_fp8 import Blocks, quantize_blocks
from tests.conftest import LIMITS, relative_error
from tests.pallas_kernels.lowering import HOPPER, TPU, kernels_in, on
from tests.pallas_kernels.numeric import float64, normal

N, K = 144, 272
BF16, F32, F8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
SIZES = {"mixed": (130, 0, 70, 1), "one-has-all": (0, 300, 0, 0), "none": (0, 0, 0, 0)}
shape_of = jax.ShapeDtypeStruct


def case(sizes):
    """Operands with poisoned padding, and the rows of each group."""
    padded = -(-np.array(sizes) // 128) * 128
    starts = np.cumsum(padded) - padded
    rows = int(padded.sum()) + 128
    real_M = np.zeros((rows, 1), bool)
    groups = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    for group in groups:
        real_M[group] = True
    x_MK = jnp.where(real_M, normal(0, (rows, K), BF16), jnp.nan)
    dy_MN = jnp.where(real_M, normal(1, (rows, N), BF16), jnp.inf)
    return x_MK, dy_MN, normal(2, (len(sizes), N, K)), np.array(sizes, np.int32), groups


@pytest.mark.parametrize("accumulate", [False, True], ids=["master", "accumulator"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients_do_not_see_the_padding(sizes, accumulate):
    x_MK, dy_MN, w_GNK, sizes_G, groups = case(sizes)
    total_GNK = jnp.ones_like(w_GNK)

    @jax.jit
    def step(x, w, total, dy, sizes):
        call = lambda x, w: grouped_linear(x, weight, w, sizes, accumulate)
        weight = quantize_blocks(w)
        y, backward = jax.vjp(call, x, total if accumulate else w)
        return y, *backward(dy)

    y_MN, dx_MK, dw_GNK = step(x_MK, w_GNK, total_GNK, dy_MN, sizes_G)
    dw_GNK = dw_GNK - 1 if accumulate else dw_GNK
    assert (y_MN.dtype, dx_MK.dtype, dw_GNK.dtype) == (BF16, BF16, F32)
    for group, rows in enumerate(groups):
        x, dy, w = float64(x_MK[rows]), float64(dy_MN[rows]), float64(w_GNK[group])
        if not len(x):
            assert not np.any(np.asarray(dw_GNK[group]))
            continue
        assert relative_error(y_MN[rows], x @ w.T) < LIMITS["fp8"].value
        assert relative_error(dx_MK[rows], dy @ w) < LIMITS["fp8"].gradient
        assert relative_error(dw_GNK[group], dy.T @ x) < LIMITS["fp8"].gradient


@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_row_tiles_cover_every_group_once(sizes, rows):
    padded = -(-np.array(sizes, np.int32) // 128) * 128
    starts = np.cumsum(padded, dtype=np.int32) - padded
    num_rows = int(padded.sum()) + 128
    first, group, end, used = hopper.row_tiles(*map(jnp.asarray, (starts, padded)), num_rows, rows)
    assert used[0] <= first.shape[0]
    covered = np.full(num_rows, -1)
    for i in range(int(used[0])):
        span = slice(int(first[i]), min(int(first[i]) + rows, int(end[i])))
        assert np.all(covered[span] == -1)
        covered[span] = group[i]
    right = np.full(num_rows, -1)
    for i, (start, size) in enumerate(zip(starts, padded, strict=True)):
        right[start : start + size] = i
    np.testing.assert_array_equal(covered, right)


SHAPES = [(64, 1408, 2048), (8, 2048, 7168), (32, 4096, 7168), (8, 7168, 2048), (3, 144, 272)]


@pytest.mark.parametrize("accumulate", [False, True], ids=["master", "accumulator"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "G{}-N{}-K{}".format(*shape))
def test_forward_and_gradients_lower_for_hopper(shape, accumulate):
    groups, n, k = shape
    rows = 1024 + groups * 128
    up = lambda size, to: -(-size // to) * to
    blocks = lambda n, k: (
        shape_of((groups, n, up(k, 128)), F8),
        shape_of((groups, -(-n // 128), up(-(-k // 128), 32)), F32),
    )

    def step(x, weight, w, sizes):
        loss = lambda x, w: grouped_linear(x, weight, w, sizes, accumulate).astype(F32).sum()
        return jax.value_and_grad(loss, (0, 1))(x, w)

    shapes = (
        shape_of((rows, k), BF16),
        Blocks(*blocks(n, k), *blocks(k, n)),
        shape_of((groups, n, k), F32),
        shape_of((groups,), jnp.int32),
    )
    with on(HOPPER):
        text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert kernels_in(text) == 6


BAD = {
    "sizes-dtype": (dict(sizes=np.array([8, 8], np.float32)), "int32"),
    "sizes-shape": (dict(sizes=np.array([8], np.int32)), r"int32 \[2\]"),
    "rows": (dict(rows=200), "M=200"),
    "too-many": (dict(sizes=np.array([129, 1], np.int32)), "take 384 rows"),
    "implementation": (dict(implementation="fast"), "must be one of"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(changes, message):
    given = dict(rows=256, sizes=np.array([8, 8], np.int32), implementation=None) | changes
    w_GNK = jnp.zeros((2, 16, 16))
    with pytest.raises(ValueError, match=message):
        grouped_linear(
            jnp.zeros((given["rows"], 16)),
            quantize_blocks(w_GNK),
            w_GNK,
            jnp.asarray(given["sizes"]),
            False,
            False,
            given["implementation"],
        )


def test_tpus_are_refused_by_name():
    w_GNK = jnp.zeros((1, 16, 16))
    weight, sizes_G = quantize_blocks(w_GNK), jnp.array([8], jnp.int32)
    x_MK = jnp.zeros((128, 16))
    multiply = lambda x_MK: grouped_linear(x_MK, weight, w_GNK, sizes_G)
    with on(TPU), pytest.raises(NotImplementedError, match="TPU v5p"):
        jax.eval_shape(multiply, x_MK)
