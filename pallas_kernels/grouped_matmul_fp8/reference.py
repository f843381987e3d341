"""The meaning of the grouped FP8 products in plain jnp, FP32; the CPU path and the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

TILE = 128


def _decode(codes_MK, scale_kM):
    scale_MK = jnp.repeat(scale_kM[:, : codes_MK.shape[0]].T, TILE, axis=1)
    return codes_MK.astype(jnp.float32) * scale_MK


def by_rows(
    a_codes_MK: Float[Array, "M K"],
    a_scale_kM: Float[Array, "k M"],
    b_codes_GNK: Float[Array, "G N K"],
    b_scale_Gnk: Float[Array, "G n _"],
    group_m: Int32[Array, "m"],
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "M N"]:
    """Each 128 rows times the weight of their group; rows of group G, which has none, become 0."""
    num_groups, n, k = b_codes_GNK.shape
    a_mtK = _decode(a_codes_MK, a_scale_kM).reshape(-1, TILE, k)

    def multiply(args):
        a_tK, group = args
        real = group < num_groups
        group = jnp.minimum(group, num_groups - 1)
        scale_nK = jnp.repeat(b_scale_Gnk[group][:, : k // TILE], TILE, axis=1)
        b_NK = b_codes_GNK[group].astype(jnp.float32) * jnp.repeat(scale_nK, TILE, axis=0)[:n]
        y_tN = jnp.einsum("tk,nk->tn", a_tK, b_NK, precision="highest")
        return jnp.where(real, y_tN, 0).astype(out_dtype)

    return jax.lax.map(multiply, (a_mtK, group_m)).reshape(-1, n)


def by_contraction(
    y_codes_NM: Float[Array, "N M"],
    y_scale_mN: Float[Array, "m N"],
    x_codes_KM: Float[Array, "K M"],
    x_scale_mK: Float[Array, "m K"],
    group_m: Int32[Array, "m"],
    accumulator_GNK: Float[Array, "G N K"],
) -> Float[Array, "G N K"]:
    """Adds the product over each 128 tokens to their group; those of group G count for nothing."""
    split = lambda x_KM: x_KM.reshape(x_KM.shape[0], -1, TILE).swapaxes(0, 1)
    y_mNt, x_mKt = split(_decode(y_codes_NM, y_scale_mN)), split(_decode(x_codes_KM, x_scale_mK))

    def add(total_GNK, args):
        y_Nt, x_Kt, group = args
        product_NK = jnp.einsum("nt,kt->nk", y_Nt, x_Kt, precision="highest")
        return total_GNK.at[group].add(product_NK, mode="drop"), None

    # The first block stays outside the scan: its sum varies over the mesh axes that the data does.
    first = add(accumulator_GNK, (y_mNt[0], x_mKt[0], group_m[0]))[0]
    return jax.lax.scan(add, first, (y_mNt[1:], x_mKt[1:], group_m[1:]))[0]
