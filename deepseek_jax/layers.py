"""The pieces every block is made of: initialisation, RMSNorm, embedding, gated feed-forward."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from deepseek_jax import few_rows, fp8
from deepseek_jax.config import ModelConfig
from deepseek_jax.fp8 import Quantized, QuantizedWeight
from deepseek_jax.linear import Activation
from deepseek_jax.swiglu import gated_ffn
from sharding import local, shard
from sharding.placement import current_mesh


class RoutingBias(nnx.Variable):
    """State of the router that no gradient reaches (section 2.1.2 of the V3 report)."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: ModelConfig) -> nnx.Param:
    """N(0, init_std^2), as all matrices of V2 and V3; the same draws on any mesh."""
    # The bits of one dimension are those of many, in order, and compile in a third of the time;
    # but only an array drawn in its own shape is made in its shards.
    drawn = shape if current_mesh() else (math.prod(shape),)
    bits = jax.random.bits(rngs.params(), drawn, jnp.uint32).reshape(shape)
    return nnx.Param(config.init_std * _standard_normal(bits))


@jax.jit
def _standard_normal(bits: jax.Array) -> jax.Array:
    """FP32 normals of 32 random bits each, those that jax.random.normal makes of them."""
    # 23 bits are the mantissa of a number in [1, 2), which becomes one in (-1, 1).
    one_to_two = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(low, (one_to_two - 1) * (np.float32(1) - low) + low)
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)


def ones(size: int) -> nnx.Param:
    return nnx.Param(jnp.ones((size,), jnp.float32))


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in FP32; x's dtype returned."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (x32 * scale * weight).astype(x.dtype)


def norm_for(
    reader: Any,
    x: Float[Array, "... D"],
    gain: Float[Array, " D"],
    eps: float,
    letters: str,
    *,
    power_of_two: bool = False,
) -> jax.Array | Quantized:
    """RMSNorm as the product with `reader` takes it: in tiles where that weight is quantised."""
    if not fp8.is_quantized(reader):
        few = few_rows.are_few(x)
        return few_rows.normed((x, gain), eps=eps)[0] if few else rms_norm(x, gain, eps)
    normed = rms_norm(x, gain, eps)
    return fp8.quantize_norm(
        x,
        normed,
        gain,
        letters,
        epsilon=eps,
        power_of_two=power_of_two,
        implementation=reader.implementation,
    )


def norms_for(
    *norms: tuple[Any, jax.Array, Float[Array, " D"], str], eps: float
) -> list[jax.Array | Quantized]:
    """`norm_for` of each reader, x, gain and letters; few rows have their sums made together."""
    rows_and_gains = [(x, gain) for _, x, gain, _ in norms]
    plain = not any(fp8.is_quantized(reader) for reader, *_ in norms)
    if plain and all(few_rows.are_few(x) for x, _ in rows_and_gains):
        return few_rows.normed(*rows_and_gains, eps=eps)
    return [norm_for(reader, x, gain, eps, letters) for reader, x, gain, letters in norms]


@jax.named_scope("embed")
def embed(
    tokens_BT: Int[Array, "B T"], embed_VD: Float[Array, "V D"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Rows of the embedding in `dtype`; their gradients are added up in the table's own dtype.

    Raises:
      ValueError: the tokens are no integers, or not of two dimensions.
    """
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers [B, T], not {tokens_BT.dtype} {list(tokens_BT.shape)}"
        )
    rows = local(lambda tokens, table: table[tokens], "BT,VD->BTD", whole="V")
    return shard(rows(tokens_BT, embed_VD).astype(dtype), "BTD")


class FeedForward(nnx.Module):
    """W_down (SiLU(W_gate x) * W_up x)."""

    def __init__(self, config: ModelConfig, ffn_dim: int, *, rngs: nnx.Rngs):
        D, F = config.model_dim, ffn_dim
        self.w_gate_FD = normal(rngs, (F, D), config)
        self.w_up_FD = normal(rngs, (F, D), config)
        self.w_down_DF = normal(rngs, (D, F), config)

    @property
    def weights(self) -> tuple[jax.Array | QuantizedWeight, ...]:
        return self.w_gate_FD[...], self.w_up_FD[...], self.w_down_DF[...]

    @jax.named_scope("ffn")
    def __call__(self, x_BTD: Activation) -> Float[Array, "B T D"]:
        return gated_ffn(x_BTD, *self.weights)
