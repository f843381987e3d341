"""The meaning of causal attention in plain jnp, a chunk of queries at a time; the CPU path."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Scores of a chunk of queries (FP32) take at most this much; longer inputs go chunk by chunk and
# recompute their scores in the backward pass, so that no T x S array exists.
CHUNK_BYTES = 64 * 2**20


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
    scores_BNTS = scale * jnp.einsum(
        "BTNA,BSNA->BNTS", q_BTNA, k_BSNA, preferred_element_type=jnp.float32
    )
    position_S = jnp.arange(k_BSNA.shape[1], dtype=jnp.int32)
    visible_BNTS = (position_S[None, :] <= position_T[:, None])[None, None]
    if segments_BT is not None:
        same_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
        visible_BNTS = visible_BNTS & same_BTS[:, None]
    scores_BNTS = jnp.where(visible_BNTS, scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNU.dtype)
    o_BTNU = jnp.einsum("BNTS,BSNU->BTNU", weights_BNTS, v_BSNU, preferred_element_type=jnp.float32)
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
