"""The product that every matrix of the model goes through, and the dtypes of a Precision."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax import few_rows, fp8
from deepseek_jax.e5m6 import E5M6
from deepseek_jax.fp8 import Quantized, QuantizedWeight
from pallas_kernels import grouped_matmul_fp8, matmul_fp8, products
from pallas_kernels.quantize_fp8 import Blocks, Tiles, quantize_tiles
from sharding import local

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
Activation = jax.Array | Quantized | E5M6 | few_rows.Scaled


def linear(signature: str, x: Activation, weight: jax.Array | QuantizedWeight) -> jax.Array:
    """einsum(signature, x, weight) in x's dtype: `linear("BTD,FD->BTF", x_BTD, w_FD)`.

    Sums are FP32. The gradient of the weight leaves the product in the dtype of the weight: FP32
    for masters, though the product itself multiplies in x's dtype, so that it is also summed over
    devices in FP32. With a quantised weight the product and both of its gradients are FP8.
    """
    if isinstance(x, few_rows.Scaled):
        if few_rows.is_summed(signature, x.rows, weight):
            return few_rows.sums(signature, x, weight).astype(x.dtype)
        x = x.x
    if not fp8.is_quantized(weight):
        return local(functools.partial(_product, signature), signature)(x, weight)
    if isinstance(x, jax.Array):
        left = signature.partition(",")[0]
        x = fp8.quantize(x, left, implementation=weight.implementation)
    return fp8.on_shards(functools.partial(_linear_fp8, signature), signature, x, weight)


def linears(
    x: Activation, *products: tuple[str, jax.Array | QuantizedWeight]
) -> list[jax.Array]:
    """`linear` of x [B, T, D] with weights [*, D]; few rows read all of them in one kernel."""
    if isinstance(x, few_rows.Scaled):
        # No array of its own where a sum reads it.
        whole_ND = jnp.concatenate([weight for _, weight in products])
        signature = "BTD,ND->BTN"
        if few_rows.is_summed(signature, x.rows, whole_ND):
            ends = itertools.accumulate(weight.shape[0] for _, weight in products[:-1])
            return jnp.split(linear(signature, x, whole_ND), list(ends), axis=-1)
    return [linear(signature, x, weight) for signature, weight in products]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(signature, x, weight):
    return einsum(signature, x, weight.astype(x.dtype), x.dtype)


def _product_fwd(signature, x, weight):
    return _product(signature, x, weight), (x, weight)


def _product_bwd(signature, residuals, g):
    x, weight = residuals
    left, right, out = few_rows.letters(signature)
    dx = einsum(f"{out},{right}->{left}", g, weight.astype(x.dtype), x.dtype)
    dw = einsum(f"{out},{left}->{right}", g, x, weight.dtype)
    return dx, dw


_product.defvjp(_product_fwd, _product_bwd)


def einsum(signature: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """jnp.einsum with FP32 sums and a result in `dtype`; FP32 operands multiply as FP32."""
    if few_rows.is_summed(signature, a, b):
        return few_rows.sums(signature, a, b).astype(dtype)
    if few_rows.packs_weights(*few_rows.letters(signature)[::2], a, b):
        return few_rows.weight_first(signature, a, b).astype(dtype)
    return products.einsum(signature, a, b, dtype)


def _linear_fp8(signature: str, x: Quantized | E5M6, weight: QuantizedWeight) -> jax.Array:
    """The product on local shards, flattened to matrices [M, K] and [N, K]."""
    _, outputs, contracted = fp8.sides(few_rows.letters(signature)[1])
    tokens, shape = x.x.shape[: -len(contracted)], weight.target.shape[: len(outputs)]
    padded_n, k = weight.blocks.codes.shape[0], weight.blocks.transposed.shape[0]
    target = weight.target.reshape(-1, k)
    n = target.shape[0]
    target = jnp.pad(target, ((0, padded_n - n), (0, 0)))
    kept = dataclasses.replace(x, x=None)
    y_MN = _product_fp8(options_of(weight), x.x.reshape(-1, k), target, kept, weight.blocks)
    return y_MN[:, :n].reshape(*tokens, *shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_fp8(options, x_MK, target, kept, blocks):
    return multiply(fp8.by_rows(kept, options.implementation), blocks, None, options)


def _product_fp8_fwd(options, x_MK, target, kept, blocks):
    y_MN = _product_fp8(options, x_MK, target, kept, blocks)
    return y_MN, (saved_target(target, options), fp8.as_bytes((kept, blocks)))


def _product_fp8_bwd(options, saved, dy_MN):
    target, codes = saved
    kept, blocks = fp8.from_bytes(codes)
    implementation = options.implementation
    dy, dy_columns = quantize_tiles(dy_MN, by="both", implementation=implementation)
    x_columns = fp8.by_columns(
        kept, blocks.transposed.shape[0], counts_m=None, implementation=implementation
    )
    dx_MK = multiply(dy, transposed(blocks), None, options)
    dw = weight_gradient(dy_columns, x_columns, None, target, options)
    return dx_MK, dw, None, None


_product_fp8.defvjp(_product_fp8_fwd, _product_fp8_bwd)


# The three products of FP8 operands, dense or by group.


class Options(NamedTuple):
    """How a weight's products are made."""

    accumulate: bool
    implementation: str | None


def options_of(weight: QuantizedWeight) -> Options:
    return Options(weight.accumulate, weight.implementation)


def multiply(
    a: Tiles,
    blocks: Blocks,
    group_sizes_G: jax.Array | None,
    options: Options,
    *more: tuple[Tiles, Blocks],
) -> jax.Array:
    """a @ weight.T in BF16, with the products of `more` added before it is rounded."""
    operands = a, blocks.codes, blocks.scale
    given = dict(
        more=[(a, blocks.codes, blocks.scale) for a, blocks in more],
        implementation=options.implementation,
    )
    if group_sizes_G is None:
        return matmul_fp8.matmul(*operands, **given)
    return grouped_matmul_fp8.by_rows(*operands, group_sizes_G, **given)


def transposed(blocks: Blocks) -> Blocks:
    return Blocks(blocks.transposed, blocks.transposed_scale, blocks.codes, blocks.scale)


def weight_gradient(
    dy: Tiles, x: Tiles, group_sizes_G: jax.Array | None, target: jax.Array, options: Options
) -> jax.Array:
    """dy.T @ x in FP32, added to the target where it is an accumulator."""
    total, chosen = target if options.accumulate else None, options.implementation
    if group_sizes_G is None:
        dw = matmul_fp8.weight_gradient(dy, x, total, implementation=chosen)
    else:
        dw = grouped_matmul_fp8.by_contraction(
            dy, x, group_sizes_G, total, implementation=chosen
        )
    return dw.astype(target.dtype)


def saved_target(target: jax.Array, options: Options) -> jax.Array:
    """What the backward pass needs of a target: the sum so far, or of a master its dtype alone."""
    return target if options.accumulate else jnp.zeros((0,), target.dtype)
