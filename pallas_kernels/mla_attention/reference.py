"""The meaning of causal attention in plain jnp, a chunk of queries at a time; the CPU path."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.products import einsum

# Scores of a chunk of queries (FP32) take at most this much; longer inputs go chunk by chunk and
# recompute their scores in the backward pass, so that no T x S array exists.
CHUNK_BYTES = 64 * 2**20


def scores(
    q_BTNA, k_BSNA, position_T, segments_BT, segments_BS, *, scale: float
) -> Float[Array, "B N T S"]:
    """scale * q k^T in FP32, -inf for what a query does not see."""
    scores_BNTS = scale * einsum("BTNA,BSNA->BNTS", q_BTNA, k_BSNA)
    position_S = jnp.arange(k_BSNA.shape[1], dtype=jnp.int32)
    visible_BNTS = (position_S[None, :] <= position_T[:, None])[None, None]
    if segments_BT is not None:
        same_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
        visible_BNTS = visible_BNTS & same_BTS[:, None]
    return jnp.where(visible_BNTS, scores_BNTS, -jnp.inf)


def attend(
    q_BTNA: Float[Array, "B T N A"],
    k_BSNA: Float[Array, "B S N A"],
    v_BSNU: Float[Array, "B S N U"],
    position_T: Int32[Array, "T"],
    segments_BT: Int32[Array, "B T"] | None,
    segments_BS: Int32[Array, "B S"] | None,
    *,
    scale: float,
) -> Float[Array, "B T N U"]:
    """softmax(scale * q k^T) v over the keys at or before each query, softmax in FP32."""
    scores_BNTS = scores(q_BTNA, k_BSNA, position_T, segments_BT, segments_BS, scale=scale)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNU.dtype)
    o_BTNU = einsum("BNTS,BSNU->BTNU", weights_BNTS, v_BSNU)
    return o_BTNU.astype(q_BTNA.dtype)


def mla_attention(
    q_BTNA: Float[Array, "B T N A"],
    k_BSNA: Float[Array, "B S N A"],
    v_BSNU: Float[Array, "B S N U"],
    segments_BT: Int32[Array, "B T"] | None,
    *,
    scale: float,
) -> Float[Array, "B T N U"]:
    """Causal attention; the queries are the last T of the S positions."""
    B, T, N, _ = q_BTNA.shape
    S = k_BSNA.shape[1]
    position_T = jnp.arange(S - T, S, dtype=jnp.int32)
    chunk = max(1, CHUNK_BYTES // (B * N * S * 4))
    if chunk >= T:
        return attend(q_BTNA, k_BSNA, v_BSNU, position_T, segments_BT, segments_BT, scale=scale)
    num_chunks = -(-T // chunk)
    chunk = -(-T // num_chunks)
    extra = num_chunks * chunk - T
    dtype = q_BTNA.dtype
    # In FP32 across the chunks, so that their gradients sum in FP32.
    k32_BSNA, v32_BSNU = k_BSNA.astype(jnp.float32), v_BSNU.astype(jnp.float32)

    def split(array, axis):
        widths = [(0, extra if i == axis else 0) for i in range(array.ndim)]
        shape = (*array.shape[:axis], num_chunks, chunk, *array.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(array, widths, mode="edge").reshape(shape), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_chunk(k32_BSNA, v32_BSNU, q_BTNA, position_T, segments_BT_of_chunk):
        return attend(
            q_BTNA,
            k32_BSNA.astype(dtype),
            v32_BSNU.astype(dtype),
            position_T,
            segments_BT_of_chunk,
            segments_BT,
            scale=scale,
        )

    chunks = (
        split(q_BTNA, 1),
        split(position_T, 0),
        None if segments_BT is None else split(segments_BT, 1),
    )
    o_chunks = jax.lax.map(lambda args: attend_chunk(k32_BSNA, v32_BSNU, *args), chunks)
    o_BTNU = jnp.moveaxis(o_chunks, 0, 1).reshape(B, num_chunks * chunk, N, -1)
    return o_BTNU[:, :T]


def log_sum_exp(
    q_BTNA: Float[Array, "B T N A"],
    k_BSNA: Float[Array, "B S N A"],
    segments_BT: Int32[Array, "B T"] | None,
    *,
    scale: float,
) -> Float[Array, "B N T"]:
    """log of the sum over keys of exp(score), with which backward finds the softmax again."""

    def one(args):
        q_BTNA, position_T, segments_of_chunk = args
        scores_BNTS = scores(
            q_BTNA, k_BSNA, position_T, segments_of_chunk, segments_BT, scale=scale
        )
        return jax.nn.logsumexp(scores_BNTS, axis=-1)

    parts_cBNT = jax.lax.map(one, _chunks(q_BTNA, k_BSNA, segments_BT))
    return jnp.moveaxis(parts_cBNT, 0, 2).reshape(*parts_cBNT.shape[1:3], -1)


def backward(
    q_BTNA: Float[Array, "B T N A"],
    k_BSNA: Float[Array, "B S N A"],
    v_BSNU: Float[Array, "B S N U"],
    segments_BT: Int32[Array, "B T"] | None,
    o_BTNU: Float[Array, "B T N U"],
    log_sum_exp_BNT: Float[Array, "B N T"],
    do_BTNU: Float[Array, "B T N U"],
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from what forward kept, with S == T:

    dv = p^T do, dp = do v^T, ds = p (dp - do . o), dq = scale ds k, dk = scale ds^T q.
    """
    dtype = q_BTNA.dtype

    def add(sums, args):
        (q_BTNA, position_T, segments), (o_BTNU, do_BTNU, lse_BNT) = args
        scores_BNTS = scores(q_BTNA, k_BSNA, position_T, segments, segments_BT, scale=scale)
        p_BNTS = jnp.exp(scores_BNTS - lse_BNT[..., None])
        dp_BNTS = einsum("BTNU,BSNU->BNTS", do_BTNU, v_BSNU)
        inner_BNT = einsum("BTNU,BTNU->BNT", do_BTNU, o_BTNU)
        ds_BNTS = (scale * p_BNTS * (dp_BNTS - inner_BNT[..., None])).astype(dtype)
        parts = (
            einsum("BNTS,BTNA->BSNA", ds_BNTS, q_BTNA),
            einsum("BNTS,BTNU->BSNU", p_BNTS.astype(dtype), do_BTNU),
        )
        dq_BTNA = einsum("BNTS,BSNA->BTNA", ds_BNTS, k_BSNA).astype(dtype)
        return (parts if sums is None else jax.tree.map(jnp.add, sums, parts)), dq_BTNA

    queries = _chunks(q_BTNA, k_BSNA, segments_BT)
    count = queries[1].shape[0]
    lse_cBNT = jnp.moveaxis(log_sum_exp_BNT.reshape(*log_sum_exp_BNT.shape[:2], count, -1), 2, 0)
    chunks = (queries, (_split(o_BTNU, count), _split(do_BTNU, count), lse_cBNT))
    # The first chunk stays outside the scan: its sums vary over the mesh axes that the data does.
    sums, first = add(None, jax.tree.map(lambda array: array[0], chunks))
    sums, rest = jax.lax.scan(add, sums, jax.tree.map(lambda array: array[1:], chunks))
    dq_BTNA = jnp.moveaxis(jnp.concatenate((first[None], rest)), 0, 1).reshape(q_BTNA.shape)
    return dq_BTNA, *(total.astype(dtype) for total in sums)


def _chunks(q_BTNA, k_BSNA, segments_BT):
    """Queries, their positions and segments, cut along T into the fewest equal chunks that fit."""
    B, T, N, _ = q_BTNA.shape
    smallest = -(-T * B * N * k_BSNA.shape[1] * 4 // CHUNK_BYTES)
    count = next(n for n in range(min(smallest, T), T + 1) if T % n == 0)
    positions_cT = jnp.arange(T, dtype=jnp.int32).reshape(count, -1)
    segments = None if segments_BT is None else _split(segments_BT, count)
    return _split(q_BTNA, count), positions_cT, segments


def _split(x_BT, count: int):
    shape = (x_BT.shape[0], count, x_BT.shape[1] // count, *x_BT.shape[2:])
    return jnp.moveaxis(x_BT.reshape(shape), 1, 0)
