"""The grouped product against plain float64 loops: values, gradients, padding, groups, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import (
    group_of_block,
    group_starts,
    grouped_matmul,
    is_real_row,
    reference,
)
from tests.conftest import relative_error
from tests.pallas_kernels.numeric import LIMITS, float64, normal

N, K, ALIGNMENT = 12, 20, 8
SIZES = {
    "mixed": (3, 0, 16, 9, 0, 1),
    "one-group-has-all": (0, 0, 29, 0),
    "first-and-last-empty": (0, 8, 7, 0),
    "no-rows": (0, 0, 0),
    "one-group": (11,),
}


def starts_of(sizes):
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    return np.cumsum([0, *padded])[:-1]


def case(sizes, x_dtype=jnp.float32, w_dtype=jnp.float32, unused_blocks=2):
    """Operands, a cotangent, and which rows are real."""
    rows = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes) + unused_blocks * ALIGNMENT
    real_M = np.zeros(rows, bool)
    for start, size in zip(starts_of(sizes), sizes, strict=True):
        real_M[start : start + size] = True
    x_MK, dy_MN = normal(0, (rows, K), x_dtype), normal(1, (rows, N), x_dtype)
    w_GNK = normal(2, (len(sizes), N, K), w_dtype)
    return x_MK, w_GNK, np.array(sizes, np.int32), dy_MN, real_M


def expected(x_MK, w_GNK, sizes, dy_MN):
    """Output and both gradients in float64; weights rounded to the dtype of x as the op does."""
    w_GNK = w_GNK.astype(x_MK.dtype)
    x, w, dy = float64(x_MK), float64(w_GNK), float64(dy_MN)
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, (start, size) in enumerate(zip(starts_of(sizes), sizes, strict=True)):
        rows = slice(start, start + size)
        y[rows] = x[rows] @ w[group].T
        dx[rows] = dy[rows] @ w[group]
        dw[group] = dy[rows].T @ x[rows]
    return y, dx, dw


def run(x_MK, w_GNK, sizes, dy_MN):
    call = jax.jit(functools.partial(grouped_matmul, alignment=ALIGNMENT))
    y_MN, backward = jax.vjp(lambda x, w: call(x, w, sizes), x_MK, w_GNK)
    return y_MN, *backward(dy_MN)


@pytest.mark.parametrize("batch_bytes", [2**20, 3 * N * K * 4], ids=["at-once", "in-batches"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(sizes, batch_bytes, monkeypatch):
    monkeypatch.setattr(reference, "BATCH_BYTES", batch_bytes)
    x_MK, w_GNK, sizes, dy_MN, _ = case(sizes)
    for found, right in zip(
        run(x_MK, w_GNK, sizes, dy_MN), expected(x_MK, w_GNK, sizes, dy_MN), strict=True
    ):
        assert relative_error(found, right) < LIMITS[found.dtype]


@pytest.mark.parametrize("w_dtype", [jnp.float32, jnp.bfloat16], ids=["master-fp32", "bf16"])
def test_bf16_rows_give_weight_gradients_in_the_dtype_of_the_weight(w_dtype):
    x_MK, w_GNK, sizes, dy_MN, _ = case(SIZES["mixed"], jnp.bfloat16, w_dtype)
    y_MN, dx_MK, dw_GNK = run(x_MK, w_GNK, sizes, dy_MN)
    right = expected(x_MK, w_GNK, sizes, dy_MN)
    assert (y_MN.dtype, dx_MK.dtype, dw_GNK.dtype) == (jnp.bfloat16, jnp.bfloat16, w_dtype)
    assert relative_error(y_MN, right[0]) < LIMITS[y_MN.dtype]
    assert relative_error(dx_MK, right[1]) < LIMITS[dx_MK.dtype]
    assert relative_error(dw_GNK, right[2]) < LIMITS[dw_GNK.dtype]


def test_poisoned_padding_reaches_nothing():
    x_MK, w_GNK, sizes, dy_MN, real_M = case(SIZES["mixed"])
    clean = run(x_MK, w_GNK, sizes, dy_MN)
    padding = ~real_M[:, None]
    poisoned = run(
        jnp.where(padding, jnp.nan, x_MK), w_GNK, sizes, jnp.where(padding, jnp.inf, dy_MN)
    )
    for one, other in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.any(np.asarray(poisoned[0])[~real_M])
    assert not np.any(np.asarray(poisoned[1])[~real_M])


def test_empty_groups_have_a_gradient_of_exactly_zero():
    x_MK, w_GNK, sizes, dy_MN, _ = case(SIZES["mixed"])
    dw_GNK = run(x_MK, w_GNK, sizes, dy_MN)[2]
    assert not np.any(np.asarray(dw_GNK)[sizes == 0])
    assert np.all(np.any(np.asarray(dw_GNK)[sizes > 0], axis=(1, 2)))


def test_layout_of_groups():
    sizes = jnp.array(SIZES["mixed"], jnp.int32)
    np.testing.assert_array_equal(group_starts(sizes, ALIGNMENT), starts_of(SIZES["mixed"]))
    blocks = group_of_block(sizes, num_blocks=8, alignment=ALIGNMENT)
    np.testing.assert_array_equal(blocks, [0, 2, 2, 3, 3, 5, 6, 6])
    real_M = is_real_row(sizes, num_rows=64, alignment=ALIGNMENT)
    np.testing.assert_array_equal(real_M, case(SIZES["mixed"])[-1])


def test_works_on_local_rows_inside_shard_map():
    x_MK, w_GNK, sizes, dy_MN, _ = case(SIZES["mixed"])
    count = 2
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def local(x_MK, w_GNK, sizes_1G, dy_MN):
        w_GNK = jax.lax.pcast(w_GNK, ("data",), to="varying")
        y_MN, dx_MK, dw_GNK = run(x_MK, w_GNK, sizes_1G[0], dy_MN)
        return y_MN, dx_MK, jax.lax.psum(dw_GNK, "data")

    twice = lambda array: jnp.concatenate([array] * count)
    rows = spec("data")
    y_MN, dx_MK, dw_GNK = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, spec(), rows, rows),
            out_specs=(rows, rows, spec()),
            check_vma=True,
        )
    )(twice(x_MK), w_GNK, twice(sizes[None]), twice(dy_MN))
    y, dx, dw = expected(x_MK, w_GNK, sizes, dy_MN)
    assert relative_error(y_MN, np.concatenate([y] * count)) < LIMITS[y_MN.dtype]
    assert relative_error(dx_MK, np.concatenate([dx] * count)) < LIMITS[dx_MK.dtype]
    assert relative_error(dw_GNK, count * dw) < LIMITS[dw_GNK.dtype]


BAD = {
    "k-differs": (dict(x_shape=(16, 5)), "stored"),
    "groups-differ": (dict(sizes=np.array([8], np.int32)), "groups"),
    "sizes-int64": (dict(sizes=np.array([8, 8], np.int64)), "int32"),
    "too-many-rows": (dict(sizes=np.array([9, 8], np.int32)), "take 24 rows"),
    "alignment": (dict(alignment=7), "multiple"),
    "dtype": (dict(dtype=jnp.float16), "float32 or bfloat16"),
    "implementation": (dict(implementation="fast"), "must be one of"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(changes, message):
    given = dict(
        x_shape=(16, 6),
        sizes=np.array([8, 8], np.int32),
        dtype=jnp.float32,
        alignment=8,
        implementation=None,
    )
    given |= changes
    with pytest.raises(ValueError, match=message):
        grouped_matmul(
            jnp.zeros(given["x_shape"], given["dtype"]),
            jnp.zeros((2, 4, 6)),
            given["sizes"],
            alignment=given["alignment"],
            implementation=given["implementation"],
        )
