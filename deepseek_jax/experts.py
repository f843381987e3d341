"""The feed-forward networks of the routed experts, on rows sorted by expert."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from deepseek_jax.layers import swiglu
from pallas_kernels.grouped_matmul.api import grouped_matmul


def expert_ffn(
    x_MD: Float[Array, "M D"],
    weight_M: Float[Array, " M"],
    weights: tuple[jax.Array, jax.Array, jax.Array],
    group_sizes_E: Int[Array, " E"],
    alignment: int,
) -> Float[Array, "M D"]:
    """weight_m W_down (SiLU(W_gate x_m) * W_up x_m) of each row, with the weights of its expert.

    The routing weight is multiplied into the SwiGLU output, so combine is a plain sum.

    Args:
      weights: w_gate_EFD, w_up_EFD, w_down_EDF.
      group_sizes_E: rows of each expert; groups start at multiples of `alignment`.
    """
    w_gate_EFD, w_up_EFD, w_down_EDF = weights
    matmul = functools.partial(grouped_matmul, group_sizes_G=group_sizes_E, alignment=alignment)
    gate_MF = checkpoint_name(matmul(x_MD, w_gate_EFD), "ffn_hidden")
    up_MF = checkpoint_name(matmul(x_MD, w_up_EFD), "ffn_hidden")
    return matmul(swiglu(gate_MF, up_MF, weight_M[:, None]), w_down_EDF)
