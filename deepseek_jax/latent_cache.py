"""The cache of multi-head latent attention: C + R elements per token and layer, for all layers.

Either as they are, or the latent in FP8 tiles of 128 with the rotated key in BF16 (of V3 656 bytes
per token and layer instead of 1152).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig
from pallas_kernels.mosaic import target
from pallas_kernels.quantize_fp8.reference import TILE
from pallas_kernels.rounding import to_fp8
from sharding.placement import on_several_devices

E4M3 = jnp.float8_e4m3fn
FORMATS = ("fp32", "bf16", "fp8")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """Arrays [L, B, S, ...]; with `layer` set, the cache of that layer as attention sees it."""

    latent_LBSY: jax.Array | None = None
    codes_LBSC: jax.Array | None = None
    scale_LBSc: jax.Array | None = None
    rotary_LBSR: jax.Array | None = None
    layer: Int[Array, ""] | None = None

    def at(self, layer: jax.Array | int) -> "LatentCache":
        return replace(self, layer=jnp.asarray(layer, jnp.int32))

    def append(self, latent_BTY: Float[Array, "B T Y"], start_B: Int[Array, " B"]) -> "LatentCache":
        """With the latents of T tokens written from position start_B on."""
        write = lambda array, new: _write(array, new.astype(array.dtype), self.layer, start_B)
        if self.latent_LBSY is not None:
            return replace(self, latent_LBSY=write(self.latent_LBSY, latent_BTY))
        content_BTC, rotary_BTR = jnp.split(latent_BTY, [self.codes_LBSC.shape[-1]], axis=-1)
        codes_BTC, scale_BTc = encode(content_BTC)
        return replace(
            self,
            codes_LBSC=write(self.codes_LBSC, codes_BTC),
            scale_LBSc=write(self.scale_LBSc, scale_BTc),
            rotary_LBSR=write(self.rotary_LBSR, rotary_BTR),
        )

    def read(self, dtype: jax.typing.DTypeLike, length: int) -> Float[Array, "B S Y"]:
        """What the layer's first tokens have left, in the dtype that attention computes in."""
        layer_of = lambda array: jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False)
        of = lambda array: jax.lax.slice_in_dim(layer_of(array), 0, length, axis=1)
        if self.latent_LBSY is not None:
            return of(self.latent_LBSY).astype(dtype)
        content_BSC = decode(of(self.codes_LBSC), of(self.scale_LBSc))
        rotary_BSR = of(self.rotary_LBSR)
        return jnp.concatenate((content_BSC.astype(dtype), rotary_BSR.astype(dtype)), axis=-1)

    @property
    def capacity(self) -> int:
        """S: tokens that fit."""
        array = self.rotary_LBSR if self.latent_LBSY is None else self.latent_LBSY
        return array.shape[2]

    @property
    def num_bytes(self) -> int:
        leaves = jax.tree.leaves(replace(self, layer=None))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"unknown cache format {format!r}: use {', '.join(FORMATS)}")


def empty_cache(
    config: ModelConfig, batch: int, length: int, format: str = "bf16", *, layers: int | None = None
) -> LatentCache:
    """Room for `length` tokens of each sequence in all layers, or in so many."""
    check_format(format)
    C, R, Y = config.kv_latent_dim, config.rotary_head_dim, config.cache_dim
    lead = (config.num_layers if layers is None else layers, batch, length)
    zeros = lambda size, dtype: jnp.zeros((*lead, size), dtype)
    if format != "fp8":
        dtype = jnp.float32 if format == "fp32" else jnp.bfloat16
        return LatentCache(latent_LBSY=zeros(Y, dtype))
    return LatentCache(
        codes_LBSC=zeros(C, E4M3),
        scale_LBSc=zeros(-(-C // TILE), jnp.float32),
        rotary_LBSR=zeros(R, jnp.bfloat16),
    )


def encode(x_BTC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes and a scale for every 128 elements (the last tile may be short)."""
    tiles = _tiles(x_BTC.astype(jnp.float32))
    scale = jnp.maximum(jnp.max(jnp.abs(tiles), axis=-1), 1e-4) / 448.0
    codes = to_fp8(tiles / scale[..., None])
    return codes.reshape(*codes.shape[:-2], -1)[..., : x_BTC.shape[-1]], scale


def decode(codes_BSC: jax.Array, scale_BSc: jax.Array) -> jax.Array:
    """FP32 values of codes."""
    tiles = _tiles(codes_BSC.astype(jnp.float32)) * scale_BSc[..., None]
    return tiles.reshape(*tiles.shape[:-2], -1)[..., : codes_BSC.shape[-1]]


def _tiles(x: jax.Array) -> jax.Array:
    missing = -x.shape[-1] % TILE
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),))
    return x.reshape(*x.shape[:-1], -1, TILE)


def _write(array_LBSX, new_BTX, layer, start_B) -> jax.Array:
    zero = jnp.zeros((), jnp.int32)

    def one(array_LSX, new_TX, start):
        return jax.lax.dynamic_update_slice(array_LSX, new_TX[None], (layer, start, zero))

    if new_BTX.shape[0] == 1:
        # Without a scatter the update is made in place on every backend.
        return one(array_LBSX[:, 0], new_BTX[0], start_B[0])[:, None]
    if target().platform == "cpu" and not on_several_devices():
        # The scatter below would be one into a copy of the whole cache.
        def text(b, array_LBSX):
            new_TX = jax.lax.dynamic_index_in_dim(new_BTX, b, keepdims=False)
            start = jax.lax.dynamic_index_in_dim(start_B, b, keepdims=False)
            at = layer, b, start, zero
            return jax.lax.dynamic_update_slice(array_LBSX, new_TX[None, None], at)

        return jax.lax.fori_loop(0, new_BTX.shape[0], text, array_LBSX)
    return jax.vmap(one, in_axes=(1, 0, 0), out_axes=1)(array_LBSX, new_BTX, start_B)
