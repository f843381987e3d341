"""The meaning of the block-scaled products in plain jnp, FP32; the CPU path and the oracle."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

TILE = 128


def decode_tiles(codes_MK, scale_kM) -> Float[Array, "M K"]:
    """code * scale, one scale for 128 neighbours of a row."""
    scale_MK = jnp.repeat(scale_kM[:, : codes_MK.shape[0]].T, TILE, axis=1)
    return codes_MK.astype(jnp.float32) * scale_MK


def decode_blocks(codes_NK, scale_nk) -> Float[Array, "N K"]:
    """code * scale, one scale for 128 x 128."""
    n, k = codes_NK.shape
    scale_NK = jnp.repeat(jnp.repeat(scale_nk[:, : k // TILE], TILE, axis=0), TILE, axis=1)
    return codes_NK.astype(jnp.float32) * scale_NK[:n]


def _contract_last(a_MK, b_NK):
    return lax.dot_general(a_MK, b_NK, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def matmul(a_codes_MK, a_scale_kM, b_codes_NK, b_scale_nk, out_dtype) -> Float[Array, "M N"]:
    """Tiles of 1 x 128 times blocks of 128 x 128."""
    a_MK, b_NK = decode_tiles(a_codes_MK, a_scale_kM), decode_blocks(b_codes_NK, b_scale_nk)
    return _contract_last(a_MK, b_NK).astype(out_dtype)


def weight_gradient(y_codes_NM, y_scale_mN, x_codes_KM, x_scale_mK) -> Float[Array, "N K"]:
    """Tiles of 1 x 128 on both sides."""
    return _contract_last(
        decode_tiles(y_codes_NM, y_scale_mN), decode_tiles(x_codes_KM, x_scale_mK)
    )
