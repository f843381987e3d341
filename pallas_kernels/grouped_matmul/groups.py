"""How groups of rows lie in one array: back to back, each starting at a multiple of `alignment`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


def padded_sizes(group_sizes_G: Int32[Array, "G"], alignment: int) -> Int32[Array, "G"]:
    """Rows that each group occupies, its padding included."""
    return (group_sizes_G + (alignment - 1)) // alignment * alignment


def group_starts(group_sizes_G: Int32[Array, "G"], alignment: int) -> Int32[Array, "G"]:
    """First row of each group."""
    padded_G = padded_sizes(group_sizes_G, alignment)
    return jnp.cumsum(padded_G, dtype=jnp.int32) - padded_G


def group_of_block(
    group_sizes_G: Int32[Array, "G"], *, num_blocks: int, alignment: int, block: int | None = None
) -> Int32[Array, "num_blocks"]:
    """Group of each block of `block` (or `alignment`) rows; G for the unused blocks at the end."""
    ends_G = jnp.cumsum(padded_sizes(group_sizes_G, alignment), dtype=jnp.int32)
    first_row = jnp.arange(num_blocks, dtype=jnp.int32) * (block or alignment)
    # A search step by step would be a loop of small kernels.
    found = jnp.searchsorted(ends_G, first_row, side="right", method="compare_all")
    return found.astype(jnp.int32)


def is_real_row(
    group_sizes_G: Int32[Array, "G"], *, num_rows: int, alignment: int
) -> Bool[Array, "num_rows"]:
    """True for the rows that hold data, False for padding and for unused rows."""
    num_groups = group_sizes_G.shape[0]
    groups = group_of_block(group_sizes_G, num_blocks=num_rows // alignment, alignment=alignment)
    ends_G = group_starts(group_sizes_G, alignment) + group_sizes_G
    end_of_block = jnp.where(groups < num_groups, ends_G[jnp.minimum(groups, num_groups - 1)], 0)
    return jnp.arange(num_rows, dtype=jnp.int32) < jnp.repeat(end_of_block, alignment)
