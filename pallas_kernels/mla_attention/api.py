"""Causal attention with d_qk != d_v: its checks and the choice of implementation."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.mla_attention import cudnn, reference
from pallas_kernels.mosaic import target

IMPLEMENTATIONS = (None, "reference", "cudnn")


def mla_attention(
    q_BTNA: Float[Array, "B T N A"],
    k_BSNA: Float[Array, "B S N A"],
    v_BSNU: Float[Array, "B S N U"],
    *,
    scale: float,
    segments_BT: Int32[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N U"]:
    """o = softmax(scale * q k^T) v over the keys at or before each query, softmax in FP32.

    The queries are the last T of the S positions. No T x S array is kept in memory.

    Args:
      segments_BT: attention stays inside positions of equal id (needs T == S).
      implementation: "reference", "cudnn", or None for the best one on the target device.
    """
    _check(q_BTNA, k_BSNA, v_BSNU, segments_BT)
    chosen = choose(implementation, q_BTNA.dtype, segments_BT is not None)
    if chosen == "cudnn":
        return cudnn.mla_attention(q_BTNA, k_BSNA, v_BSNU, scale=scale)
    return reference.mla_attention(q_BTNA, k_BSNA, v_BSNU, segments_BT, scale=scale)


def mla_attention_forward(
    q_BTNA: Float[Array, "B T N A"],
    k_BTNA: Float[Array, "B T N A"],
    v_BTNU: Float[Array, "B T N U"],
    *,
    scale: float,
    segments_BT: Int32[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N T"]]:
    """The output, and the logarithm of the sums of the softmax, for a gradient by hand.

    With them a caller decides what it keeps of the output until mla_attention_backward.
    """
    _check(q_BTNA, k_BTNA, v_BTNU, segments_BT)
    chosen = choose(implementation, q_BTNA.dtype, segments_BT is not None)
    if chosen == "cudnn":
        return cudnn.forward(q_BTNA, k_BTNA, v_BTNU, scale=scale)
    return (
        reference.mla_attention(q_BTNA, k_BTNA, v_BTNU, segments_BT, scale=scale),
        reference.log_sum_exp(q_BTNA, k_BTNA, segments_BT, scale=scale),
    )


def mla_attention_backward(
    q_BTNA: Float[Array, "B T N A"],
    k_BTNA: Float[Array, "B T N A"],
    v_BTNU: Float[Array, "B T N U"],
    o_BTNU: Float[Array, "B T N U"],
    log_sum_exp_BNT: Float[Array, "B N T"],
    do_BTNU: Float[Array, "B T N U"],
    *,
    scale: float,
    segments_BT: Int32[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N A"], Float[Array, "B T N A"], Float[Array, "B T N U"]]:
    """Gradients of q, k and v from what mla_attention_forward returned."""
    chosen = choose(implementation, q_BTNA.dtype, segments_BT is not None)
    if chosen == "cudnn":
        return cudnn.backward(q_BTNA, k_BTNA, v_BTNU, o_BTNU, log_sum_exp_BNT, do_BTNU, scale=scale)
    return reference.backward(
        q_BTNA, k_BTNA, v_BTNU, segments_BT, o_BTNU, log_sum_exp_BNT, do_BTNU, scale=scale
    )


def choose(implementation: str | None, dtype: DTypeLike, has_segments: bool) -> str:
    """The implementation to run on the target device."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}")
    can_cudnn = dtype == jnp.bfloat16 and not has_segments
    if implementation == "cudnn" and not can_cudnn:
        raise NotImplementedError(
            f"cuDNN attention takes bfloat16 without segments, not {dtype} with {has_segments=}: "
            "use implementation='reference'"
        )
    if implementation is None:
        return "cudnn" if can_cudnn and target().is_hopper else "reference"
    return implementation


def _check(q_BTNA, k_BSNA, v_BSNU, segments_BT):
    shapes = f"q {q_BTNA.shape}, k {k_BSNA.shape}, v {v_BSNU.shape}"
    if q_BTNA.ndim != 4 or k_BSNA.ndim != 4 or v_BSNU.ndim != 4:
        raise ValueError(f"mla_attention wants [batch, position, heads, width], not {shapes}")
    B, T, N, A = q_BTNA.shape
    S = k_BSNA.shape[1]
    if k_BSNA.shape != (B, S, N, A) or v_BSNU.shape[:3] != (B, S, N):
        raise ValueError(f"batch, heads, key positions and the q/k width must agree: {shapes}")
    if T > S:
        raise ValueError(f"{T=} queries must be the last of {S=} positions")
    if not q_BTNA.dtype == k_BSNA.dtype == v_BSNU.dtype:
        raise ValueError(f"q, k, v must agree: {q_BTNA.dtype}, {k_BSNA.dtype}, {v_BSNU.dtype}")
    if segments_BT is not None and (segments_BT.shape != (B, T) or T != S):
        raise ValueError(f"segments {segments_BT.shape} must be {(B, T)} with T == S={S}")
