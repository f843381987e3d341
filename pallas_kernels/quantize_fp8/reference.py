"""The meaning of the FP8 formats in plain jnp; the CPU path and the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.rounding import to_bf16, to_fp8

F8 = jnp.float8_e4m3fn
TILE = 128
F8_MAX = 448.0
# Far below what gradients of a mean over any number of tokens are: only tiles of zeros meet it.
AMAX_FLOOR = 1e-30


def scale_of(amax: Float[Array, "..."], power_of_two: bool) -> Float[Array, "..."]:
    """amax / 448, amax floored at 1e-30; NaN if amax is not finite."""
    scale = jnp.maximum(amax, jnp.float32(AMAX_FLOOR)) * jnp.float32(1 / F8_MAX)
    if power_of_two:
        # Up to the next exponent unless the mantissa is 0: exact, unlike a logarithm.
        bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
        scale = jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & ~0x7FFFFF, jnp.float32)
    return jnp.where(amax < jnp.inf, scale, jnp.float32(jnp.nan))


def amax_of(x: Float[Array, "..."], axis) -> Float[Array, "..."]:
    """max |x|, infinite if any of x is not finite: on CPU a maximum may drop a NaN (seen)."""
    return jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.float32(jnp.inf)).max(axis=axis)


def encode(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """round(x / scale) to E4M3, saturating: a plain cast gives NaN above 464."""
    return to_fp8(x * (1 / scale))


def pad(x, multiples):
    """Zeros at the end of each dimension, up to a multiple."""
    return jnp.pad(x, [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)])


def mask(x_MK: Float[Array, "M K"], counts_m: Int32[Array, "m"] | None) -> Float[Array, "M K"]:
    """x, with 0 in the rows of each 128 from a count on."""
    if counts_m is None:
        return x_MK
    row_M = jnp.arange(x_MK.shape[0], dtype=jnp.int32)
    real_M = row_M % TILE < jnp.repeat(counts_m, TILE)[: x_MK.shape[0]]
    return jnp.where(real_M[:, None], x_MK, jnp.zeros_like(x_MK))


def tiles(x_MK: Float[Array, "M K"], power_of_two: bool) -> tuple[Array, Array]:
    """Codes [M, 128 k] and scales [k, M], M rounded up to a multiple of 4 by rows of zeros."""
    num_rows = x_MK.shape[0]
    x_MK = pad(x_MK.astype(jnp.float32), (4, TILE))
    x_Mkt = x_MK.reshape(x_MK.shape[0], -1, TILE)
    scale_Mk = scale_of(amax_of(x_Mkt, 2), power_of_two)
    codes_Mkt = encode(x_Mkt, scale_Mk[:, :, None])
    return codes_Mkt.reshape(x_MK.shape)[:num_rows], scale_Mk.T


def decode_tiles(codes_MK, scale_kM) -> Float[Array, "M K"]:
    """FP32 values, the zeros at the end of the contraction included."""
    scale_MK = jnp.repeat(scale_kM[:, : codes_MK.shape[0]].T, TILE, axis=1)
    return codes_MK.astype(jnp.float32) * scale_MK


def blocks(w_GNK: Float[Array, "G N K"], power_of_two: bool) -> tuple[Array, Array]:
    """Codes [G, N, 128 k] and scales [G, n, k], k rounded up to a multiple of 32."""
    groups, n, _ = w_GNK.shape
    w_GNK = pad(w_GNK.astype(jnp.float32), (1, TILE, TILE))
    w_Gnakb = w_GNK.reshape(groups, w_GNK.shape[1] // TILE, TILE, w_GNK.shape[2] // TILE, TILE)
    scale_Gnk = scale_of(amax_of(w_Gnakb, (2, 4)), power_of_two)
    codes_GNK = encode(w_Gnakb, scale_Gnk[:, :, None, :, None]).reshape(w_GNK.shape)
    return codes_GNK[:, :n], pad(scale_Gnk, (1, 1, 32))


def decode_blocks(codes_GNK, scale_Gnk) -> Float[Array, "G N K"]:
    """FP32 values, the zeros at the end of the contraction included."""
    _, n, k = codes_GNK.shape
    scale_GnK = jnp.repeat(scale_Gnk[:, :, : k // TILE], TILE, axis=2)
    return codes_GNK.astype(jnp.float32) * jnp.repeat(scale_GnK, TILE, axis=1)[:, :n]


def rms_norm(x_MK, gain_K, epsilon: float) -> Float[Array, "M K"]:
    """x / sqrt(mean(x^2) + epsilon) * gain in FP32, rounded to BF16."""
    x = x_MK.astype(jnp.float32)
    factor_M1 = jax.lax.rsqrt(jnp.square(x).mean(axis=1, keepdims=True) + epsilon)
    return to_bf16(x * factor_M1 * gain_K.astype(jnp.float32)[None])


def swiglu(gate_MK, up_MK, weight_M=None) -> Float[Array, "M K"]:
    """silu(gate) * up * weight in FP32, rounded to BF16."""
    product = jax.nn.silu(gate_MK.astype(jnp.float32)) * up_MK.astype(jnp.float32)
    if weight_M is not None:
        product = product * weight_M.astype(jnp.float32)[:, None]
    return to_bf16(product)


def swiglu_gradient(gate_MK, up_MK, dy_MK, weight_M=None):
    """Gradients of gate, up and weight, and the product again, from FP32 inputs; rounded to BF16.

    The gradient of the weight stays FP32.
    """
    dy_MK = dy_MK.astype(jnp.float32)

    def product(gate_MK, up_MK, weight_M):
        out_MK = jax.nn.silu(gate_MK) * up_MK
        return out_MK if weight_M is None else out_MK * weight_M[:, None]

    if weight_M is not None:
        weight_M = weight_M.astype(jnp.float32)
    product_MK, backward = jax.vjp(product, gate_MK, up_MK, weight_M)
    dgate_MK, dup_MK, dweight_M = backward(dy_MK)
    return (*map(to_bf16, (dgate_MK, dup_MK, product_MK)), dweight_M)
