"""The meaning of the grouped products, block by block in plain jnp; the CPU path and the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped_matmul.groups import group_of_block, is_real_row
from pallas_kernels.products import einsum, precision_of

# Blocks are taken together until their gathered weights (or weight gradients) reach this size:
# one batched product is fastest on CPU, and its copy of a weight per block must not fill memory.
BATCH_BYTES = 64 * 2**20


def _blocks(x_MK, group_sizes_G, alignment):
    """Rows as blocks of one group each, padding set to 0, and the group of each block."""
    num_rows, num_groups = x_MK.shape[0], group_sizes_G.shape[0]
    real_M = is_real_row(group_sizes_G, num_rows=num_rows, alignment=alignment)
    x_MK = jnp.where(real_M[:, None], x_MK, jnp.zeros_like(x_MK))
    groups = group_of_block(group_sizes_G, num_blocks=num_rows // alignment, alignment=alignment)
    return x_MK.reshape(-1, alignment, x_MK.shape[1]), jnp.minimum(groups, num_groups - 1)


def by_rows(
    x_MK: Float[Array, "M K"],
    w_GNK: Float[Array, "G _ _"],
    group_sizes_G: Int32[Array, "G"],
    *,
    alignment: int,
    contract_last: bool = True,
) -> Float[Array, "M _"]:
    """y[m] = x[m] @ w[group of m].T, or x[m] @ w[group of m] when not `contract_last`.

    Then w is [G, K, N].
    """
    blocks, groups = _blocks(x_MK, group_sizes_G, alignment)
    contracted = 1 if contract_last else 0

    def multiply(args):
        block_MK, group = args
        dims = (((1,), (contracted,)), ((), ()))
        product = jax.lax.dot_general(
            block_MK, w_GNK[group], dims, precision=precision_of(block_MK),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return product.astype(x_MK.dtype)

    batch = max(1, BATCH_BYTES // (w_GNK[0].size * w_GNK.dtype.itemsize))
    y = jax.lax.map(multiply, (blocks, groups), batch_size=min(batch, blocks.shape[0]))
    return y.reshape(x_MK.shape[0], -1)


def by_contraction(
    y_MN: Float[Array, "M N"],
    x_MK: Float[Array, "M K"],
    group_sizes_G: Int32[Array, "G"],
    *,
    alignment: int,
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "G N K"]:
    """w[g] = sum over the rows m of group g of outer(y[m], x[m]), summed in FP32."""
    y_blocks, groups = _blocks(y_MN, group_sizes_G, alignment)
    x_blocks, _ = _blocks(x_MK, group_sizes_G, alignment)
    num_groups, n, k = group_sizes_G.shape[0], y_MN.shape[1], x_MK.shape[1]
    batch = min(max(1, BATCH_BYTES // (n * k * 4)), y_blocks.shape[0])
    num_batches = -(-y_blocks.shape[0] // batch)
    extra = num_batches * batch - y_blocks.shape[0]

    def split(array):
        widths = ((0, extra),) + ((0, 0),) * (array.ndim - 1)
        return jnp.pad(array, widths).reshape(num_batches, batch, *array.shape[1:])

    def add(total_GNK, args):
        y_bMN, x_bMK, group_b = args
        part_bNK = einsum("bmn,bmk->bnk", y_bMN, x_bMK)
        return total_GNK.at[group_b].add(part_bNK), None

    batches = (split(y_blocks), split(x_blocks), split(groups))
    # The first batch stays outside the scan: its sum varies over the mesh axes that the data does.
    total_GNK, _ = add(
        jnp.zeros((num_groups, n, k), jnp.float32), jax.tree.map(lambda array: array[0], batches)
    )
    if num_batches > 1:
        rest = jax.tree.map(lambda array: array[1:], batches)
        total_GNK, _ = jax.lax.scan(add, total_GNK, rest)
    return total_GNK.astype(out_dtype)
