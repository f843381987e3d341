"""Attention against plain float64 numpy: values, gradients, causality, segments, memory, cuDNN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_attention import mla_attention, reference
from tests.conftest import relative_error
from tests.pallas_kernels.numeric import LIMITS, float64, normal

B, T, N, A, U, SCALE = 2, 19, 3, 12, 8, 0.37
SEGMENTS_BT = np.array([[0] * 5 + [1] * 9 + [2] * 5, [7] * 19], np.int32)


def operands(dtype=jnp.float32, S=T):
    return (
        normal(0, (B, T, N, A), dtype),
        normal(1, (B, S, N, A), dtype),
        normal(2, (B, S, N, U), dtype),
        normal(3, (B, T, N, U), dtype),
    )


def expected(q, k, v, do, segments_BT=None):
    """Output and gradients in float64, from the formulas."""
    q, k, v, do = map(float64, (q, k, v, do))
    S = k.shape[1]
    visible = np.arange(S)[None, :] <= np.arange(S - T, S)[:, None]
    visible = np.broadcast_to(visible[None, None], (B, N, T, S))
    if segments_BT is not None:
        visible = visible & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    s = np.where(visible, SCALE * np.einsum("btna,bsna->bnts", q, k), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    dp = np.einsum("btnu,bsnu->bnts", do, v)
    ds = SCALE * p * (dp - (p * dp).sum(-1, keepdims=True))
    return (
        np.einsum("bnts,bsnu->btnu", p, v),
        np.einsum("bnts,bsna->btna", ds, k),
        np.einsum("bnts,btna->bsna", ds, q),
        np.einsum("bnts,btnu->bsnu", p, do),
    )


def run(q, k, v, do, segments_BT=None):
    segments_BT = None if segments_BT is None else jnp.asarray(segments_BT)
    call = functools.partial(mla_attention, scale=SCALE, segments_BT=segments_BT)
    o, backward = jax.vjp(jax.jit(call), q, k, v)
    return o, *backward(do)


@pytest.fixture(params=[0, 5], ids=["at-once", "chunks-of-5"])
def chunk(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(reference, "CHUNK_BYTES", request.param * B * N * T * 4)


@pytest.mark.parametrize("segments", [None, SEGMENTS_BT], ids=["whole", "segments"])
def test_values_and_gradients(segments, chunk):
    args = operands()
    for found, right in zip(run(*args, segments), expected(*args, segments), strict=True):
        assert relative_error(found, right) < LIMITS[found.dtype]


def test_bf16(chunk):
    args = operands(jnp.bfloat16)
    for found, right in zip(run(*args), expected(*args), strict=True):
        assert found.dtype == jnp.bfloat16
        # Weights and their gradients are rounded to BF16 between the two products.
        assert relative_error(found, right) < 3 * LIMITS[found.dtype]


def test_queries_are_the_last_positions(chunk):
    args = operands(S=T + 11)
    for found, right in zip(run(*args), expected(*args), strict=True):
        assert relative_error(found, right) < LIMITS[found.dtype]


def test_future_tokens_do_not_change_the_past(chunk):
    q, k, v, do = operands()
    step, cut = jax.jit(lambda *args: run(*args)), 9
    later = (jnp.arange(T) >= cut)[None, :, None, None]
    changed = [jnp.where(later, 50 * x + 3, x) for x in (q, k, v)]
    past = step(q, k, v, do)[0][:, :cut]
    np.testing.assert_array_equal(past, step(*changed, do)[0][:, :cut])
    _, dq, dk, dv = step(q, k, v, jnp.where(later, 0.0, do))
    for gradient in (dq, dk, dv):
        assert not np.any(np.asarray(gradient)[:, cut:])


def test_segments_do_not_see_each_other(chunk):
    q, k, v, do = operands()
    segments = np.tile(SEGMENTS_BT[:1], (B, 1))
    second = (segments == 1)[:, :, None, None]
    changed = [jnp.where(second, 50 * x + 3, x) for x in (q, k, v)]
    others = segments != 1
    step = jax.jit(lambda *args: run(*args)[0])
    before, after = step(q, k, v, do, segments), step(*changed, do, segments)
    np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


def test_long_inputs_keep_no_square_array(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2**22)
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16) for width in (16, 16, 8)]

    def loss(q, k, v):
        return mla_attention(q, k, v, scale=SCALE).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**22
    assert f"{length},{length}" not in compiled.as_text()


def test_works_on_local_heads_inside_shard_map(chunk):
    args = operands()
    mesh = jax.make_mesh((B,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    local = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True))
    for found, right in zip(local(*args), expected(*args), strict=True):
        assert relative_error(found, right) < LIMITS[found.dtype]


def test_cudnn_program_is_made_without_a_gpu():
    shapes = [jax.ShapeDtypeStruct((1, 256, 4, width), jnp.bfloat16) for width in (192, 192, 128)]

    def loss(q, k, v):
        o_BTNU = mla_attention(q, k, v, scale=SCALE, implementation="cudnn")
        return o_BTNU.astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",))
    text = program.as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text


BAD = {
    "heads-differ": (dict(k=(1, 4, 3, 6)), ValueError, "must agree"),
    "rank": (dict(q=(4, 2, 6)), ValueError, "wants"),
    "more-queries-than-keys": (dict(q=(1, 5, 2, 6)), ValueError, "last of"),
    "implementation": (dict(implementation="fast"), ValueError, "must be one of"),
    "cudnn-fp32": (dict(implementation="cudnn"), NotImplementedError, "bfloat16"),
}


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(changes, error, message):
    given = dict(q=(1, 4, 2, 6), k=(1, 4, 2, 6), v=(1, 4, 2, 3), implementation=None) | changes
    with pytest.raises(error, match=message):
        mla_attention(
            *(jnp.zeros(given[name]) for name in "qkv"),
            scale=1.0,
            implementation=given["implementation"],
        )
