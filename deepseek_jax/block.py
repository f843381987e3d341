"""One transformer block, a stack of them run by scan, and what is kept for the backward pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.attention import Attention
from deepseek_jax.config import ModelConfig, Remat
from deepseek_jax.latent_cache import LatentCache
from deepseek_jax.layers import FeedForward, norm_for, ones
from deepseek_jax.moe import Load, MoE, read_from_stack
from deepseek_jax.residual import rounded
from pallas_kernels.mosaic import target

# What the backward pass keeps of a block beside its input; the rest is computed again.
# paper: RMSNorms, MLA's up-projections and SwiGLU outputs are recomputed (V3 report, 3.2.3). Who is
# routed where is a few integers a token, and takes many small kernels to find.
REMAT: dict[Remat, Callable | None] = {
    "none": None,
    "paper": jax.checkpoint_policies.save_only_these_names(
        "latent", "attention", "route", "expert_input", "ffn_hidden"
    ),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Layers of a cached pass that an accelerator runs without a loop around them.
LAYERS_AT_ONCE = 8


class Block(nnx.Module):
    """x + MLA(RMSNorm(x)), then x + FFN(RMSNorm(x)); the FFN is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, *, dense: bool, rngs: nnx.Rngs):
        self.config = config
        self.residual = "bf16"  # a key of Precision.residual; the model says which
        self.attention_norm_D = ones(config.model_dim)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm_D = ones(config.model_dim)
        self.ffn = (
            FeedForward(config, config.dense_ffn_dim, rngs=rngs)
            if dense
            else MoE(config, rngs=rngs)
        )

    def __call__(self, x_BTD, rotations_BTr, *, segments_BT=None, valid_BT=None, cache=None,
                 start_B=None) -> tuple[jax.Array, "LayerOutput"]:
        eps = self.config.norm_eps
        o_BTD, latent = self.attention(
            norm_for(
                self.attention.wkv_a_YD[...], x_BTD, self.attention_norm_D[...], eps, "BTD"
            ),
            rotations_BTr,
            segments_BT=segments_BT,
            cache=cache,
            start_B=start_B,
        )
        x_BTD = x_BTD + rounded(o_BTD, self.residual)
        is_moe = isinstance(self.ffn, MoE)
        reader = self.ffn.w_gate_EFD if is_moe else self.ffn.w_gate_FD
        # Tokens are dispatched as codes with scales that are powers of two.
        normed_BTD = norm_for(
            reader[...], x_BTD, self.ffn_norm_D[...], eps, "BTD", power_of_two=is_moe
        )
        if is_moe:
            y_BTD, load = self.ffn(normed_BTD, valid_BT, decoding=cache is not None)
        else:
            y_BTD, load = self.ffn(normed_BTD), None
        x_BTD = x_BTD + rounded(y_BTD, self.residual)
        return x_BTD, LayerOutput(x_BTD, latent, load)


class LayerOutput(NamedTuple):
    """What a block returns beside the residual stream; in a stack, every leaf has a leading L."""

    x_BTD: jax.Array
    latent_BTY: jax.Array | LatentCache  # with a cache: the new one
    load: Load | None  # None in dense layers


def stack(config: ModelConfig, num_layers: int, *, dense: bool, rngs: nnx.Rngs) -> Block | None:
    """Blocks whose parameters carry a leading dimension L; None for no layers."""
    if num_layers == 0:
        return None
    make = lambda key: Block(config, dense=dense, rngs=nnx.Rngs(key))
    return jax.vmap(make)(jax.random.split(rngs.params(), num_layers))


def run_stack(
    blocks: Block,
    x_BTD: jax.Array,
    rotations_BTr,
    *,
    keep: Callable[[LayerOutput], object],
    remat: str = "none",
    **inputs,
) -> tuple[jax.Array, object]:
    """Runs the stacked blocks in turn; returns x_BTD and, stacked over L, what `keep` picks.

    Compile time does not grow with depth. `keep` must not return the residual stream in training.
    """

    def layer(x_BTD, block):
        x_BTD, output = block(x_BTD, rotations_BTr, **inputs)
        return x_BTD, keep(output)

    return jax.lax.scan(checkpointed(layer, remat), x_BTD, blocks)


def run_cached(
    blocks: Block, x_BTD: jax.Array, rotations_BTr, cache: LatentCache, start_B, *, first: int
) -> tuple[jax.Array, LatentCache, jax.Array]:
    """Runs the stacked blocks, whose caches begin at layer `first` of the cache.

    The cache is carried and written in place. Also returns the choices that found no room.
    """

    def layer(carry, block):
        x_BTD, cache, index, lost = carry
        if isinstance(block.ffn, MoE):
            read_from_stack(block.ffn, blocks.ffn, index - first, x_BTD.size // x_BTD.shape[-1])
        x_BTD, output = block(x_BTD, rotations_BTr, cache=cache.at(index), start_B=start_B)
        if output.load is not None:
            lost = lost + output.load.lost
        return (x_BTD, replace(output.latent_BTY, layer=None), index + 1, lost), None

    carry = x_BTD, cache, jnp.int32(first), jnp.int32(0)
    # Between iterations a GPU waits longer than a kernel of one token takes.
    unroll = 1 if target().platform == "cpu" else LAYERS_AT_ONCE
    (x_BTD, cache, _, lost), _ = jax.lax.scan(layer, carry, blocks, unroll=unroll)
    return x_BTD, cache, lost


def checkpointed(fn: Callable, remat: str) -> Callable:
    """`fn` under a named policy of REMAT."""
    if remat not in REMAT:
        raise ValueError(f"unknown remat policy {remat!r}: use {', '.join(REMAT)}")
    if REMAT[remat] is None:
        return fn
    # Inside scan nothing can be merged across iterations, so the barrier against it is not needed.
    return jax.checkpoint(fn, policy=REMAT[remat], prevent_cse=False)
