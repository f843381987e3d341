"""Block-scaled FP8 products: contracts, checks, the choice of implementation, the gradient."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.matmul_fp8 import hopper, reference
from pallas_kernels.quantize_fp8.api import F8, TILE, Blocks, Tiles, quantize_tiles, retile


def matmul(
    a: Tiles,
    codes_NK: Float[Array, "N K"],
    scale_nk: Float[Array, "n k"],
    *,
    more: Sequence[tuple[Tiles, Array, Array]] = (),
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y[m, n] = sum over blocks k of 128 of scale_a[k, m] scale[n, k] (a block . b block), FP32.

    Operands as quantize_fp8 makes them: forward with a weight's codes and scale, the input gradient
    with its transposed ones. The result is rounded once, to bfloat16 or float32.

    Args:
      more: operands of further products, of the same shapes, that are added.
    """
    implementation = mosaic.choose(implementation, "matmul_fp8")
    check_products(((a, codes_NK, scale_nk), *more))
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{out_dtype=} must be bfloat16 or float32")
    if implementation == "reference":
        products = ((a, codes_NK, scale_nk), *more)
        return sum(reference.matmul(*a, *b, jnp.float32) for a, *b in products).astype(out_dtype)
    cores = mosaic.target().cores
    n, k = codes_NK.shape
    return hopper.matmul(
        *a,
        codes_NK,
        scale_nk,
        tuple((*a, *b) for a, *b in more),
        tiles=hopper.tiles_of(a.codes.shape[0], n, k * (1 + len(more)), cores),
        cores=cores,
        out_dtype=jnp.dtype(out_dtype),
    )


def weight_gradient(
    y: Tiles,
    x: Tiles,
    accumulator_NK: Float[Array, "N K"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "N K"]:
    """accumulator + sum over tokens m of outer(y[m], x[m]) in FP32; both operands by columns."""
    implementation = mosaic.choose(implementation, "weight_gradient_fp8")
    check_tiles("y", y)
    check_tiles("x", x)
    if y.codes.shape[1] != x.codes.shape[1]:
        raise ValueError(
            f"y has {y.codes.shape[1]} tokens and x has {x.codes.shape[1]}: both are tiles by "
            "columns, [channels, tokens]"
        )
    shape = (y.codes.shape[0], x.codes.shape[0])
    if accumulator_NK is not None and (
        accumulator_NK.shape != shape or accumulator_NK.dtype != jnp.float32
    ):
        raise ValueError(
            f"the accumulator must be float32 {shape}, not {accumulator_NK.dtype} "
            f"{accumulator_NK.shape}"
        )
    if implementation == "reference":
        w_NK = reference.weight_gradient(*y, *x)
        return w_NK if accumulator_NK is None else accumulator_NK + w_NK
    return hopper.weight_gradient(
        *y,
        *x,
        accumulator_NK,
        tiles=hopper.gradient_tiles_of(*shape),
        cores=mosaic.target().cores,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def linear(
    x_MK: Float[Array, "M K"],
    weight: Blocks,
    master_NK: Float[Array, "N K"],
    accumulate: bool = False,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y = x @ weight.T in FP8, forward and backward, in the dtype of x.

    x and the gradient of y are quantised 1 x 128; for backward only the codes of x are kept, and
    re-tiled there. The gradient of the weight goes to `master_NK`, which is not read: in FP32, then
    cast to its dtype. With `accumulate` it is an FP32 accumulator, whose cotangent is itself plus
    the weight's gradient. Codes and scales get no gradient.
    """
    return _forward(x_MK, weight, master_NK, accumulate, power_of_two, implementation)[0]


def _forward(x_MK, weight, master_NK, accumulate, power_of_two, implementation):
    check_master(weight, master_NK, accumulate)
    options = dict(power_of_two=power_of_two, implementation=implementation)
    x = quantize_tiles(x_MK, **options)
    y_MN = matmul(
        x, weight.codes, weight.scale, out_dtype=x_MK.dtype, implementation=implementation
    )
    # The dtype of x as an array of no elements: what is saved must be arrays.
    kept = master_NK if accumulate else jnp.zeros((0,), master_NK.dtype)
    return y_MN, (x, weight, kept, jnp.zeros((0,), x_MK.dtype))


def _backward(accumulate, power_of_two, implementation, saved, dy_MN):
    x, weight, kept, like_x = saved
    options = dict(power_of_two=power_of_two, implementation=implementation)
    dy, dy_columns = quantize_tiles(dy_MN, by="both", **options)
    dx_MK = matmul(
        dy,
        weight.transposed,
        weight.transposed_scale,
        out_dtype=like_x.dtype,
        implementation=implementation,
    )
    x_columns = retile(x, weight.transposed.shape[-2], **options)
    dw_NK = weight_gradient(
        dy_columns, x_columns, kept if accumulate else None, implementation=implementation
    )
    return dx_MK, None, dw_NK.astype(kept.dtype)


linear.defvjp(_forward, _backward)


def check_products(products: Sequence[tuple[Tiles, Array, Array]]):
    """One ValueError for what is wrong with the operands of products that are added."""
    for a, codes, scale in products:
        check_tiles("a", a)
        check_blocks("b", codes, scale)
        if a.codes.shape[1] != codes.shape[-1]:
            raise ValueError(
                f"a has K={a.codes.shape[1]} and b has K={codes.shape[-1]}: codes of a product "
                "with the transposed weight are Blocks.transposed"
            )
        first = products[0]
        if (a.codes.shape, codes.shape) != (first[0].codes.shape, first[1].shape):
            raise ValueError(
                f"products of {a.codes.shape} and {codes.shape} cannot be added to those of "
                f"{first[0].codes.shape} and {first[1].shape}"
            )


def check_tiles(name: str, x: Tiles):
    """One ValueError for what is wrong with an operand of scales for 1 x 128."""
    blocks, rest = divmod(x.codes.shape[-1], TILE)
    if x.codes.ndim != 2 or x.codes.dtype != F8 or rest:
        raise ValueError(
            f"codes of {name} must be float8_e4m3fn, their last dimension padded to a multiple of "
            f"128, not {x.codes.dtype} {x.codes.shape}"
        )
    rows = -(-x.codes.shape[0] // 4) * 4
    if x.scale.shape != (blocks, rows) or x.scale.dtype != jnp.float32:
        raise ValueError(
            f"scales of {name}, with codes {x.codes.shape}, must be float32 [{blocks}, {rows}], "
            f"not {x.scale.dtype} {x.scale.shape}"
        )


def check_blocks(name: str, codes: Array, scale: Array):
    """One ValueError for what is wrong with an operand of scales for 128 x 128."""
    *groups, n, k = codes.shape
    if codes.dtype != F8 or k % TILE or n % 16:
        raise ValueError(
            f"codes of {name} must be float8_e4m3fn, N a multiple of 16 and K padded to a multiple "
            f"of 128, not {codes.dtype} {codes.shape}"
        )
    shape = (*groups, -(-n // TILE), -(-k // TILE // 32) * 32)
    if scale.shape != shape or scale.dtype != jnp.float32:
        raise ValueError(
            f"scales of {name}, with codes {codes.shape}, must be float32 {list(shape)}, not "
            f"{scale.dtype} {scale.shape}"
        )


def check_master(weight: Blocks, master: Array, accumulate: bool):
    """One ValueError if the master's shape is not the weight's, or an accumulator is not FP32."""
    shape = (*weight.codes.shape[:-1], weight.transposed.shape[-2])
    if master.shape != shape:
        raise ValueError(f"the weight is {shape}, its master or accumulator {master.shape}")
    if accumulate and master.dtype != jnp.float32:
        raise ValueError(f"an accumulator must be float32, not {master.dtype}")
