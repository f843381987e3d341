"""SwiGLU, and the product that reads it; in FP8 its inputs are kept and its output made again."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import fp8
from deepseek_jax.fp8 import QuantizedWeight
from deepseek_jax.linear import (
    linear,
    multiply,
    options_of,
    real_rows,
    saved_target,
    transposed,
    weight_gradient,
)
from pallas_kernels.quantize_fp8 import quantize_tiles, swiglu_tiles
from sharding import shard


def swiglu(gate: jax.Array, up: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """SiLU(gate) * up, times the routing weight where there is one; computed in FP32."""
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return (hidden if weight is None else hidden * weight).astype(gate.dtype)


def swiglu_linear(
    gate_BTF: jax.Array, up_BTF: jax.Array, w_down_DF: jax.Array | QuantizedWeight
) -> jax.Array:
    """W_down SwiGLU(gate, up)."""
    if not fp8.is_quantized(w_down_DF):
        gate_BTF = checkpoint_name(gate_BTF, "ffn_hidden")
        up_BTF = checkpoint_name(up_BTF, "ffn_hidden")
        hidden_BTF = shard(swiglu(gate_BTF, up_BTF), "BTF")
        return linear("BTF,DF->BTD", hidden_BTF, w_down_DF)

    def on_rows(gate_BTF, up_BTF, w_down_DF):
        gate_MF, up_MF = (x.reshape(-1, x.shape[-1]) for x in (gate_BTF, up_BTF))
        return swiglu_product_fp8(gate_MF, up_MF, w_down_DF).reshape(*gate_BTF.shape[:-1], -1)

    return fp8.on_shards(on_rows, "BTF,BTF,DF->BTD", gate_BTF, up_BTF, w_down_DF)


def swiglu_product_fp8(
    gate_MF: jax.Array,
    up_MF: jax.Array,
    w_down: QuantizedWeight,
    weight_M: jax.Array | None = None,
    group_sizes_G: jax.Array | None = None,
) -> jax.Array:
    """W_down SwiGLU(gate, up) of rows, those of experts with their routing weights."""
    return _swiglu_product_fp8(options_of(w_down), gate_MF, up_MF, weight_M, w_down.target,
                               w_down.blocks, group_sizes_G)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_product_fp8(options, gate_MF, up_MF, weight_M, target, blocks, group_sizes_G):
    counts_m = real_rows(group_sizes_G, gate_MF.shape[0])
    given = dict(counts_m=counts_m, implementation=options.implementation)
    hidden = swiglu_tiles(gate_MF, up_MF, weight_M, **given)
    return multiply(hidden, blocks, group_sizes_G, options)


def _fwd(options, gate_MF, up_MF, weight_M, target, blocks, group_sizes_G):
    counts_m = real_rows(group_sizes_G, gate_MF.shape[0])
    given = dict(counts_m=counts_m, implementation=options.implementation)
    hidden, *tiles = swiglu_tiles(gate_MF, up_MF, weight_M, keep=True, **given)
    y_MD = multiply(hidden, blocks, group_sizes_G, options)
    kept = tuple(fp8.kept_as("ffn_hidden", *fp8.per_token(x, gate_MF.shape[:1])) for x in tiles)
    saved = fp8.as_bytes((kept, blocks))
    return y_MD, (saved_target(target, options), saved, weight_M, group_sizes_G)


def _bwd(options, saved, dy_MD):
    target, codes, weight_M, group_sizes_G = saved
    kept, blocks = fp8.from_bytes(codes)
    width = blocks.transposed.shape[-2]
    gate_MF, up_MF = (fp8.decode_tiles(codes, scale, width) for codes, scale in kept)
    counts_m = real_rows(group_sizes_G, dy_MD.shape[0])
    given = dict(counts_m=counts_m, implementation=options.implementation)
    # The gradients of experts' outputs arrive as codes with scales that are powers of two: this
    # finds the same codes again.
    exact = group_sizes_G is not None
    dy, dy_columns = quantize_tiles(dy_MD, by="both", power_of_two=exact, **given)
    dhidden_MF = multiply(dy, transposed(blocks), group_sizes_G, options)
    if weight_M is None:
        _, gradients = jax.vjp(swiglu, gate_MF, up_MF)
        dgate_MF, dup_MF, dweight_M = (*gradients(dhidden_MF), None)
    else:
        weighted = lambda gate, up, weight: swiglu(gate, up, weight[:, None])
        _, gradients = jax.vjp(weighted, gate_MF, up_MF, weight_M)
        dgate_MF, dup_MF, dweight_M = gradients(dhidden_MF)
    hidden_columns = swiglu_tiles(gate_MF, up_MF, weight_M, by="columns", **given)
    dw = weight_gradient(dy_columns, hidden_columns, group_sizes_G, target, options)
    return dgate_MF, dup_MF, dweight_M, dw, None, None


_swiglu_product_fp8.defvjp(_fwd, _bwd)
