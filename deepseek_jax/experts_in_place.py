"""The routed experts in decoding few tokens: weights are read where they lie, no token is sent.

Laying few tokens out by expert costs more than their products. Either each choice reads the
weights of its expert, and no others are read; or, where the choices are as many as the experts,
every expert reads every token and what nobody chose is weighted with 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.few_rows import Scaled, row_by_row, weight_first
from deepseek_jax.swiglu import swiglu
from pallas_kernels.mosaic import target

# Above, an expert's weights are read once for many rows, which is what dispatch is for.
MOST_TOKENS = 64


def suits(num_tokens: int, choices: int, num_experts: int) -> bool:
    """Whether so many tokens with so many choices in all are better served in place."""
    if choices < num_experts:
        return num_tokens <= MOST_TOKENS
    # An accelerator's grouped product reads each expert once, and only those chosen.
    return target().platform == "cpu" and num_tokens <= MOST_TOKENS


def ffn_in_place(
    x_TD: Float[Array, "T D"] | Scaled,
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    weights: tuple[jax.Array, jax.Array, jax.Array],
) -> Float[Array, "T D"]:
    """sum_k weight_k FFN_k(x) of each token; weights are w_gate_EFD, w_up_EFD, w_down_EDF."""
    choose = _chosen_experts
    if expert_TK.size >= weights[0].shape[0]:
        choose, x_TD = _every_expert, x_TD.x if isinstance(x_TD, Scaled) else x_TD
    return choose(x_TD, expert_TK, weight_TK, weights).astype(x_TD.dtype)


def _chosen_experts(x_TD, expert_TK, weight_TK, weights):
    T, K = expert_TK.shape
    w_gate, w_up, w_down = (
        w.at[expert_TK.reshape(-1)].get(mode="promise_in_bounds").astype(x_TD.dtype)
        for w in weights
    )
    x_JD = jnp.repeat(x_TD.rows if isinstance(x_TD, Scaled) else x_TD, K, axis=0)
    gate_JF, up_JF = row_by_row(x_JD, w_gate), row_by_row(x_JD, w_up)
    if isinstance(x_TD, Scaled):
        scale_J1 = jnp.repeat(x_TD.scale, K, axis=0)
        gate_JF, up_JF = gate_JF * scale_J1, up_JF * scale_J1
    hidden_JF = swiglu(gate_JF, up_JF, weight_TK.reshape(-1, 1)).astype(x_TD.dtype)
    y_JD = row_by_row(hidden_JF, w_down)
    return jnp.sum(y_JD.reshape(T, K, -1).astype(jnp.float32), axis=1)


def _every_expert(x_TD, expert_TK, weight_TK, weights):
    w_gate, w_up, w_down = (w.astype(x_TD.dtype) for w in weights)
    gate_EFT, up_EFT = (weight_first("TD,EFD->EFT", x_TD, w) for w in (w_gate, w_up))
    ids_E = jnp.arange(w_gate.shape[0], dtype=expert_TK.dtype)
    chosen_ETK = expert_TK[None] == ids_E[:, None, None]
    weight_ET = jnp.sum(jnp.where(chosen_ETK, weight_TK[None], 0.0), axis=-1)
    hidden_EFT = swiglu(gate_EFT, up_EFT, weight_ET[:, None, :])
    y_EDT = weight_first("EFT,EDF->EDT", hidden_EFT, w_down)
    return jnp.sum(y_EDT.astype(jnp.float32), axis=0).T
