"""SwiGLU and the feed-forward network around it; in FP8 its three products share a gradient rule.

What FP8 keeps of SwiGLU are its inputs, in tiles: one pass over them backward makes their gradients
and its output again, as codes for the products that follow.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import fp8
from deepseek_jax.fp8 import Quantized, QuantizedWeight
from deepseek_jax.linear import (
    Activation,
    linear,
    multiply,
    options_of,
    saved_target,
    transposed,
    weight_gradient,
)
from pallas_kernels.grouped_matmul_fp8.api import rows_of_blocks
from pallas_kernels.quantize_fp8 import (
    Tiles,
    quantize_tiles,
    retile,
    swiglu_gradient_tiles,
    swiglu_tiles,
)
from sharding import shard
from sharding.expert_parallel import Path, combine, send

# W_gate, W_up and W_down.
Weights = tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]


def swiglu(gate: jax.Array, up: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """SiLU(gate) * up, times the routing weight where there is one; computed in FP32."""
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return (hidden if weight is None else hidden * weight).astype(gate.dtype)


def gated_ffn(x_BTD: Activation, w_gate_FD, w_up_FD, w_down_DF) -> jax.Array:
    """W_down SwiGLU(W_gate x, W_up x)."""
    if fp8.is_quantized(w_down_DF):
        on_rows = lambda x, *weights: gated_ffn_fp8(x, weights).reshape(x.shape)
        operands = x_BTD, w_gate_FD, w_up_FD, w_down_DF
        return fp8.on_shards(on_rows, "BTD,FD,FD,DF->BTD", *operands)
    gate_BTF = checkpoint_name(linear("BTD,FD->BTF", x_BTD, w_gate_FD), "ffn_hidden")
    up_BTF = checkpoint_name(linear("BTD,FD->BTF", x_BTD, w_up_FD), "ffn_hidden")
    return linear("BTF,DF->BTD", shard(swiglu(gate_BTF, up_BTF), "BTF"), w_down_DF)


def gated_ffn_fp8(
    x: Quantized,
    weights: Weights,
    weight_M: jax.Array | None = None,
    group_sizes_G: jax.Array | None = None,
    path: Path | None = None,
) -> jax.Array:
    """The same of rows, those of experts sorted by group and with their routing weights.

    With the path on which tokens came, each token gets the sum of its rows. Its gradient goes there
    as codes, which are operands as they arrive.
    """
    layouts, hops = (None, ()) if path is None else path
    return _gated_ffn_fp8(
        hops,
        options_of(weights[0]),
        x.x.reshape(-1, x.shape[-1]),
        weight_M,
        tuple(weight.target for weight in weights),
        dataclasses.replace(x, x=None),
        tuple(weight.blocks for weight in weights),
        group_sizes_G,
        layouts,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_ffn_fp8(hops, options, x_MD, weight_M, targets, kept, blocks, group_sizes_G, layouts):
    given = dict(
        counts_m=_real_rows(group_sizes_G, x_MD), implementation=options.implementation
    )
    hidden = swiglu_tiles(*_inputs(options, kept, blocks, group_sizes_G), weight_M, **given)
    return _results(multiply(hidden, blocks[2], group_sizes_G, options), layouts, hops)


def _results(y_MD, layouts, hops):
    return y_MD if layouts is None else combine(y_MD, Path(layouts, hops))


def _inputs(options, kept, blocks, group_sizes_G):
    """gate_MF and up_MF."""
    rows = fp8.by_rows(kept, options.implementation)
    return (multiply(rows, w, group_sizes_G, options) for w in blocks[:2])


def _fwd(hops, options, x_MD, weight_M, targets, kept, blocks, group_sizes_G, layouts):
    given = dict(
        counts_m=_real_rows(group_sizes_G, x_MD), implementation=options.implementation
    )
    inputs = _inputs(options, kept, blocks, group_sizes_G)
    hidden, *tiles = swiglu_tiles(*inputs, weight_M, keep=True, **given)
    y_MD = multiply(hidden, blocks[2], group_sizes_G, options)
    tiles = [fp8.kept_as("ffn_hidden", *fp8.per_token(x, x_MD.shape[:1])) for x in tiles]
    sums = tuple(saved_target(target, options) for target in targets)
    saved = sums, fp8.as_bytes((kept, tiles, blocks)), weight_M, group_sizes_G, layouts
    return _results(y_MD, layouts, hops), saved


def _bwd(hops, options, saved, dy):
    targets, codes, weight_M, group_sizes_G, layouts = saved
    kept, tiles, (w_gate, w_up, w_down) = fp8.from_bytes(codes)
    given = dict(
        counts_m=_real_rows(group_sizes_G, tiles[0][0]), implementation=options.implementation
    )
    width = dy.shape[1]
    # In dispatch scales are powers of two, so that tiles by columns add no error.
    exact = group_sizes_G is not None
    if layouts is None:
        dy, dy_columns = quantize_tiles(dy, by="both", power_of_two=exact, **given)
    else:
        dy = send_tiles(dy, Path(layouts, hops), options.implementation)
        dy_columns = retile(dy, width, power_of_two=exact, **given)
    dhidden_MF = multiply(dy, transposed(w_down), group_sizes_G, options)
    gate, up = (Tiles(codes, fp8.by_block(scale)) for codes, scale in tiles)
    d = swiglu_gradient_tiles(gate, up, dhidden_MF, weight_M, **given)
    up_product = d.up, transposed(w_up)
    dx_MD = multiply(d.gate, transposed(w_gate), group_sizes_G, options, up_product)
    x_columns = fp8.by_columns(kept, width, **given)
    columns = (d.gate_columns, x_columns), (d.up_columns, x_columns), (dy_columns,
                                                                        d.product_columns)
    dw = tuple(
        weight_gradient(*operands, group_sizes_G, target, options)
        for operands, target in zip(columns, targets, strict=True)
    )
    return dx_MD, d.weight_M, dw, None, None, None, None


_gated_ffn_fp8.defvjp(_fwd, _bwd)


def send_tiles(x_TD: jax.Array, path: Path, implementation: str | None = None) -> Tiles:
    """Tiles by rows of the rows of experts, quantised before they are sent; padding rows are 0."""
    tiles = quantize_tiles(x_TD, power_of_two=True, implementation=implementation)
    sent = send(fp8.to_wire(*fp8.per_token(tiles, x_TD.shape[:1])), path)
    codes, scale = fp8.from_wire(*sent)
    return Tiles(codes, fp8.by_block(scale))


def _real_rows(group_sizes_G: jax.Array | None, x_MD: jax.Array) -> jax.Array | None:
    """Rows of each 128 that hold data; None where all do."""
    return None if group_sizes_G is None else rows_of_blocks(group_sizes_G, x_MD.shape[0])
