"""Experts' FP8 products: contracts, checks, the choice of implementation, the gradient."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import group_of_block, group_starts, padded_sizes
from pallas_kernels.grouped_matmul_fp8 import hopper, reference
from pallas_kernels.matmul_fp8.api import check_master, check_products, check_tiles
from pallas_kernels.quantize_fp8.api import TILE, Blocks, Tiles, quantize_tiles, retile


def rows_of_blocks(group_sizes_G: Int32[Array, "G"], num_rows: int) -> Int32[Array, "m"]:
    """Rows of each 128 that hold data: what quantising takes as `counts_m`."""
    blocks = num_rows // TILE
    group_m = group_of_block(group_sizes_G, num_blocks=blocks, alignment=TILE)
    ends_G = group_starts(group_sizes_G, TILE) + group_sizes_G
    ends_G = jnp.append(ends_G, jnp.zeros(1, jnp.int32))
    first_m = jnp.arange(blocks, dtype=jnp.int32) * TILE
    return jnp.clip(ends_G[group_m] - first_m, 0, TILE)


def by_rows(
    a: Tiles,
    codes_GNK: Float[Array, "G N K"],
    scale_Gnk: Float[Array, "G n k"],
    group_sizes_G: Int32[Array, "G"],
    *,
    more: Sequence[tuple[Tiles, Array, Array]] = (),
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y[m] = a[m] @ w[group of row m].T, block-scaled as in matmul_fp8, and `more` as there.

    Rows are sorted by group; each group starts at a multiple of 128 rows. Rows that belong to no
    group are 0 from the reference and unspecified from the kernel.
    """
    implementation = mosaic.choose(implementation, "grouped_matmul_fp8")
    check_products(((a, codes_GNK, scale_Gnk), *more))
    _check_groups(group_sizes_G, a.codes.shape[0], codes_GNK.shape[0])
    if implementation == "reference":
        group_m = group_of_block(group_sizes_G, num_blocks=a.codes.shape[0] // TILE, alignment=TILE)
        products = ((a, codes_GNK, scale_Gnk), *more)
        found = (reference.by_rows(*a, *b, group_m, jnp.float32) for a, *b in products)
        return sum(found).astype(out_dtype)
    groups, n, k = codes_GNK.shape
    return hopper.by_rows(
        *a,
        codes_GNK,
        scale_Gnk,
        group_starts(group_sizes_G, TILE),
        padded_sizes(group_sizes_G, TILE),
        tuple((*a, *b) for a, *b in more),
        tiles=hopper.tiles_of(a.codes.shape[0], groups, n, k * (1 + len(more))),
        cores=mosaic.target().cores,
        out_dtype=jnp.dtype(out_dtype),
    )


def by_contraction(
    y: Tiles,
    x: Tiles,
    group_sizes_G: Int32[Array, "G"],
    accumulator_GNK: Float[Array, "G N K"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "G N K"]:
    """accumulator[g] + sum over the tokens m of group g of outer(y[m], x[m]) in FP32.

    Both operands are tiles by columns, padding taken as 0 (`counts_m`) when they were quantised. A
    group without tokens gets exactly its accumulator, or 0.
    """
    implementation = mosaic.choose(implementation, "grouped_matmul_fp8")
    check_tiles("y", y)
    check_tiles("x", x)
    groups = group_sizes_G.shape[0]
    _check_groups(group_sizes_G, y.codes.shape[1], groups)
    if y.codes.shape[1] != x.codes.shape[1]:
        raise ValueError(
            f"y has {y.codes.shape[1]} tokens and x has {x.codes.shape[1]}: both are tiles by "
            "columns, [channels, tokens]"
        )
    shape = (groups, y.codes.shape[0], x.codes.shape[0])
    if accumulator_GNK is not None and (
        accumulator_GNK.shape != shape or accumulator_GNK.dtype != jnp.float32
    ):
        raise ValueError(
            f"the accumulator must be float32 {shape}, not {accumulator_GNK.dtype} "
            f"{accumulator_GNK.shape}"
        )
    if implementation == "reference":
        group_m = group_of_block(group_sizes_G, num_blocks=y.codes.shape[1] // TILE, alignment=TILE)
        if accumulator_GNK is None:
            accumulator_GNK = jnp.zeros(shape, jnp.float32)
        return reference.by_contraction(*y, *x, group_m, accumulator_GNK)
    return hopper.by_contraction(
        *y,
        *x,
        group_starts(group_sizes_G, TILE),
        padded_sizes(group_sizes_G, TILE),
        accumulator_GNK,
        tiles=hopper.gradient_tiles_of(y.codes.shape[1], *shape),
        cores=mosaic.target().cores,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def grouped_linear(
    x_MK: Float[Array, "M K"],
    weight: Blocks,
    master_GNK: Float[Array, "G N K"],
    group_sizes_G: Int32[Array, "G"],
    accumulate: bool = False,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y[m] = x[m] @ w[group of row m].T in FP8, forward and backward, in the dtype of x.

    As matmul_fp8.linear, for rows sorted by group. Padding and unused rows may hold anything, NaN
    included: they reach neither a real row nor a weight gradient.
    """
    return _forward(
        x_MK, weight, master_GNK, group_sizes_G, accumulate, power_of_two, implementation
    )[0]


def _forward(x_MK, weight, master_GNK, group_sizes_G, accumulate, power_of_two, implementation):
    check_master(weight, master_GNK, accumulate)
    _check_groups(group_sizes_G, x_MK.shape[0], weight.codes.shape[0])
    counts_m = rows_of_blocks(group_sizes_G, x_MK.shape[0])
    x = quantize_tiles(
        x_MK, counts_m=counts_m, power_of_two=power_of_two, implementation=implementation
    )
    y_MN = by_rows(
        x,
        weight.codes,
        weight.scale,
        group_sizes_G,
        out_dtype=x_MK.dtype,
        implementation=implementation,
    )
    # Dtypes as arrays of no elements: what is saved must be arrays.
    kept = master_GNK if accumulate else jnp.zeros((0,), master_GNK.dtype)
    return y_MN, (x, weight, kept, jnp.zeros((0,), x_MK.dtype), group_sizes_G)


def _backward(accumulate, power_of_two, implementation, saved, dy_MN):
    x, weight, kept, like_x, group_sizes_G = saved
    counts_m = rows_of_blocks(group_sizes_G, dy_MN.shape[0])
    options = dict(counts_m=counts_m, power_of_two=power_of_two, implementation=implementation)
    dy, dy_columns = quantize_tiles(dy_MN, by="both", **options)
    dx_MK = by_rows(
        dy,
        weight.transposed,
        weight.transposed_scale,
        group_sizes_G,
        out_dtype=like_x.dtype,
        implementation=implementation,
    )
    x_columns = retile(x, weight.transposed.shape[-2], **options)
    dw_GNK = by_contraction(
        dy_columns,
        x_columns,
        group_sizes_G,
        kept if accumulate else None,
        implementation=implementation,
    )
    return dx_MK, None, dw_GNK.astype(kept.dtype), None


grouped_linear.defvjp(_forward, _backward)


def _check_groups(group_sizes_G, num_rows, num_groups):
    if group_sizes_G.shape != (num_groups,) or group_sizes_G.dtype != jnp.int32:
        raise ValueError(
            f"group sizes must be int32 [{num_groups}], not {group_sizes_G.dtype} "
            f"{group_sizes_G.shape}"
        )
    if num_rows % TILE:
        raise ValueError(f"M={num_rows} must be a multiple of {TILE}")
    if not isinstance(group_sizes_G, jax.core.Tracer):
        sizes = np.asarray(group_sizes_G)
        used = int((-(-sizes // TILE) * TILE).sum())
        if sizes.min(initial=0) < 0 or used > num_rows:
            raise ValueError(
                f"groups of {sizes.tolist()} rows take {used} rows, padded to {TILE}; M={num_rows}"
            )
