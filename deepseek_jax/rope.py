"""Rotary position embedding on interleaved pairs, with YaRN (ISCA section 2.1; V3 section 4.3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig, Yarn


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair, float64 [R / 2]: theta^(-2i/R), stretched by YaRN.

    YaRN divides the frequencies of pairs that turn less than beta_slow times within the original
    length by its factor, leaves those that turn more than beta_fast times, and ramps in between.
    """
    R = config.rotary_head_dim
    freq = config.rope_theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)
    if config.yarn is None:
        return freq
    yarn = config.yarn

    def pair_of(turns: float) -> float:
        turn_length = yarn.original_length / (2 * math.pi * turns)
        return R * math.log(turn_length) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), R - 1)
    width = high - low if high > low else 0.001
    ramp = np.clip((np.arange(R // 2) - low) / width, 0.0, 1.0)
    return freq / yarn.factor * ramp + freq * (1.0 - ramp)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, and 1 without stretching."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """(H + R)^-1/2, times the square of YaRN's mscale at every length once a factor is set."""
    scale = config.query_key_dim**-0.5
    if config.yarn is not None:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def _amplitude(yarn: Yarn | None) -> float:
    if yarn is None:
        return 1.0
    top = yarn_mscale(yarn.factor, yarn.mscale)
    return top / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


@jax.named_scope("rope")
def rotations(
    positions_BT: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T r"], Float[Array, "B T r"]]:
    """cos and sin of each pair's angle, FP32, r = R / 2 pairs. B may be 1 for all sequences."""
    freq = jnp.asarray(frequencies(config), jnp.float32)
    angle = positions_BT.astype(jnp.float32)[:, :, None] * freq[None, None, :]
    amplitude = _amplitude(config.yarn)
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def rotate(x_BTNR: Float[Array, "B T N R"], rotations_BTr) -> Float[Array, "B T N R"]:
    """Turns the pairs (2i, 2i + 1) of the last dimension, in FP32; x's dtype returned."""
    cos, sin = (table[:, :, None, :] for table in rotations_BTr)
    pairs = x_BTNR.astype(jnp.float32).reshape(*x_BTNR.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
    return turned.reshape(x_BTNR.shape).astype(x_BTNR.dtype)


def positions(length: int) -> jax.Array:
    """0 .. length - 1 as [1, length], for all sequences of a batch."""
    return jnp.arange(length, dtype=jnp.int32)[None, :]
