"""The routed experts in decoding few tokens: weights are read where they lie, no token is sent.

Each choice reads the weights of its expert, and no others are read: all choices at once or, on a
CPU, one after the other, many of them by blocks of an expert's tokens. Elsewhere the shared experts
of a single token are read along with the chosen ones.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.few_rows import Scaled, row_by_row, sums, weight_first
from deepseek_jax.swiglu import swiglu
from pallas_kernels.grouped_matmul.groups import group_of_block, padded_sizes
from pallas_kernels.mosaic import target
from sharding.row_layout import empty, gather_rows, gather_sum, plan_rows

# Above, an expert's weights are read once for many rows, which is what dispatch is for.
MOST_TOKENS = 64
MOST_SUMS = 8  # of equal shapes that a GPU's compiler makes in one kernel
# Rows that a CPU multiplies together: 8 take little longer than 4, and 2 longer than each alone.
BLOCK_ROWS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OfLayer:
    """The weights of a layer's experts where they lie in the stack of all layers.

    A loop over blocks takes whole arrays: the layer's slice of the stack would be a copy.
    """

    stack: jax.Array  # [L, E, ...]
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def __getitem__(self, expert) -> "jax.Array | OfLayer":
        """The weight of an expert; all of them for an ellipsis, as nnx asks."""
        if expert is Ellipsis:
            return self
        return self.stack.reshape(-1, *self.shape[1:])[self.layer * self.shape[0] + expert]


Weights = tuple[jax.Array | OfLayer, ...]  # W_gate, W_up and W_down of experts


def suits(num_tokens: int, choices: int, num_experts: int) -> bool:
    """Whether so many tokens with so many choices in all are better served in place."""
    if choices < num_experts:
        return num_tokens <= MOST_TOKENS
    # An accelerator's grouped product reads each expert once, and only those chosen.
    return target().platform == "cpu" and num_tokens <= MOST_TOKENS


def are_blocks(num_tokens: int) -> bool:
    """Whether so few tokens are multiplied a block at a time.

    A CPU would copy the weights of all choices to memory before it multiplies them.
    """
    return target().platform == "cpu" and 1 < num_tokens <= MOST_TOKENS


def ffn_in_place(
    x_TD: Float[Array, "T D"] | Scaled,
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    weights: Weights,
) -> Float[Array, "T D"]:
    """sum_k weight_k FFN_k(x) of each token; weights are w_gate_EFD, w_up_EFD, w_down_EDF.

    Every choice is one of the experts 0 to E - 1.
    """
    choose = _chosen_experts
    if are_blocks(expert_TK.shape[0]):
        choose, x_TD = _chosen_in_blocks, x_TD.x if isinstance(x_TD, Scaled) else x_TD
    return choose(x_TD, expert_TK, weight_TK, weights).astype(x_TD.dtype)


def _chosen_experts(x_TD, expert_TK, weight_TK, weights):
    T, K = expert_TK.shape
    expert_J = expert_TK.reshape(-1)
    w_gate, w_up, w_down = (_read(w, expert_J).astype(x_TD.dtype) for w in weights)
    x_JD = jnp.repeat(x_TD.rows if isinstance(x_TD, Scaled) else x_TD, K, axis=0)
    gate_JF, up_JF = row_by_row(x_JD, w_gate), row_by_row(x_JD, w_up)
    if isinstance(x_TD, Scaled):
        scale_J1 = jnp.repeat(x_TD.scale, K, axis=0)
        gate_JF, up_JF = gate_JF * scale_J1, up_JF * scale_J1
    hidden_JF = swiglu(gate_JF, up_JF, weight_TK.reshape(-1, 1)).astype(x_TD.dtype)
    y_JD = row_by_row(hidden_JF, w_down)
    return jnp.sum(y_JD.reshape(T, K, -1).astype(jnp.float32), axis=1)


def _read(w_ENK: jax.Array, expert_J: Int[Array, " J"]) -> jax.Array:
    """The matrices of these experts, which a sum over them reads where they lie."""
    if target().platform != "gpu":
        return w_ENK.at[expert_J].get(mode="promise_in_bounds")
    # Row by row: of whole matrices a GPU's compiler does not see that elements are neighbours, and
    # reads them one at a time.
    E, N, K = w_ENK.shape
    row_JN = expert_J[:, None] * N + jnp.arange(N, dtype=expert_J.dtype)[None, :]
    return w_ENK.reshape(E * N, K).at[row_JN].get(mode="promise_in_bounds")


def reads_shared(x: Scaled, choices: int, weights: Weights, shared: Weights) -> bool:
    """Whether the shared experts of one token are best read along with the chosen ones."""
    if x.rows.size > x.shape[-1]:
        return False
    width, rest = divmod(shared[0].shape[0], weights[0].shape[1])
    if rest or choices % width or not suits(1, choices, weights[0].shape[0]):
        return False
    return 2 * (1 + choices // width) <= MOST_SUMS


def ffn_with_shared(
    x_1D: Scaled,
    expert_K: Int[Array, " K"],
    weight_K: Float[Array, " K"],
    weights: Weights,
    shared: Weights,
) -> Float[Array, "1 D"]:
    """FFN_shared(x) + sum_k weight_k FFN_k(x) of one token.

    The shared FFN is as wide as some experts. So many chosen ones are read by one sum, and then the
    sums over gates and ups are all of one shape, which makes them one kernel.
    """
    F, dtype = weights[0].shape[1], x_1D.dtype
    width = shared[0].shape[0] // F

    def products(w_EFD, shared_XD):
        groups = [_read(w_EFD, expert_K[k : k + width]) for k in range(0, expert_K.size, width)]
        each_XD = [shared_XD, *(w.reshape(shared_XD.shape) for w in groups)]
        made = [sums("TD,XD->TX", x_1D, w_XD.astype(dtype)) for w_XD in each_XD]
        return jnp.concatenate(made).reshape(-1, F)

    weight_J = jnp.concatenate((jnp.ones((width,)), weight_K))
    gate_JF, up_JF = (products(*pair) for pair in zip(weights[:2], shared[:2], strict=True))
    hidden_JF = swiglu(gate_JF, up_JF, weight_J[:, None]).astype(dtype)
    y_KD = row_by_row(hidden_JF[width:], _read(weights[2], expert_K).astype(dtype))
    y_1D = sums("TX,DX->TD", hidden_JF[:width].reshape(1, -1), shared[2].astype(dtype))
    y_1D = y_1D + jnp.sum(y_KD.astype(jnp.float32), axis=0, keepdims=True)
    return y_1D.astype(dtype)


def _chosen_in_blocks(x_TD, expert_TK, weight_TK, weights):
    (T, K), E = expert_TK.shape, weights[0].shape[0]
    are_few = 4 * T * K <= E
    if are_few:
        # Hardly two choose alike: each choice is a block, in their order.
        expert_b, num_blocks = expert_TK.reshape(-1), T * K
        x_bRD = jnp.repeat(x_TD, K, axis=0)[:, None]
        weight_b1R = weight_TK.reshape(-1, 1, 1)
    else:
        R = BLOCK_ROWS if T * K >= E else 1
        rows = plan_rows(expert_TK, E, R)
        sizes_E, M = rows.group_sizes_E, rows.slot_M.shape[0]
        expert_b = group_of_block(sizes_E, num_blocks=M // R, alignment=R)
        num_blocks = jnp.sum(padded_sizes(sizes_E, R)) // R
        x_bRD = gather_rows(x_TD, rows).reshape(M // R, R, -1)
        # Those of padding rows count for nothing: no token sums these.
        weight_b1R = weight_TK.reshape(T * K)[jnp.maximum(rows.slot_M, 0)].reshape(M // R, 1, R)
    product = functools.partial(weight_first, "RK,NK->NR")

    def block(b, y_bDR):
        of_block = lambda array: jax.lax.dynamic_index_in_dim(array, b, keepdims=False)
        w_gate, w_up, w_down = (w[of_block(expert_b)].astype(x_TD.dtype) for w in weights)
        x_RD = of_block(x_bRD)
        hidden_FR = swiglu(product(x_RD, w_gate), product(x_RD, w_up), of_block(weight_b1R))
        y_DR = product(hidden_FR.T, w_down)
        return jax.lax.dynamic_update_index_in_dim(y_bDR, y_DR, b, 0)

    B, R, D = x_bRD.shape
    y_bDR = jax.lax.fori_loop(0, num_blocks, block, empty((B, D, R), x_TD))
    if are_few:
        return jnp.sum(y_bDR.reshape(T, K, D), axis=1)
    return gather_sum(y_bDR.swapaxes(1, 2).reshape(B * R, D), rows.row_TK)
