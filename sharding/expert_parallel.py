"""Dispatch and combine: tokens to rows sorted by expert, and the experts' rows back to tokens.

Both move per-token arrays and know no format. They are each other's transpose, so forward and
backward are gathers with indices known beforehand: nothing is scattered with atomics, and results
do not depend on the order in which devices run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """Where each choice of each token goes. M rows; groups start at multiples of the alignment."""

    slot_M: jax.Array  # int32: t * K + k of the choice in this row, -1 in padding rows
    row_TK: jax.Array  # int32: the row of each choice
    group_sizes_E: jax.Array  # int32: rows of each expert without padding


def plan_rows(expert_TK: jax.Array, num_experts: int, alignment: int) -> Layout:
    """Lays the choices out by expert, in token order inside an expert. No choice is dropped.

    M is the static bound T * K + (groups that can be non-empty) * (alignment - 1), rounded up.
    """
    T, K = expert_TK.shape
    choices = expert_TK.reshape(T * K)
    order = jnp.argsort(choices, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(choices[order], jnp.arange(num_experts + 1, dtype=choices.dtype))
    starts_E = bounds[:-1].astype(jnp.int32)
    sizes_E = jnp.diff(bounds).astype(jnp.int32)
    padded_E = (sizes_E + alignment - 1) // alignment * alignment
    offset_E = jnp.cumsum(padded_E) - padded_E
    sorted_expert = choices[order]
    row = offset_E[sorted_expert] + jnp.arange(T * K, dtype=jnp.int32) - starts_E[sorted_expert]
    M = T * K + min(num_experts, T * K) * (alignment - 1)
    M = (M + alignment - 1) // alignment * alignment
    slot_M = jnp.full((M,), -1, jnp.int32).at[row].set(order, unique_indices=True)
    row_TK = jnp.zeros((T * K,), jnp.int32).at[order].set(row, unique_indices=True)
    return Layout(slot_M, row_TK.reshape(T, K), sizes_E)


def dispatch(x_TD: jax.Array, layout: Layout) -> jax.Array:
    """Rows [M, D] of the chosen tokens; padding rows are 0."""
    return _to_rows(x_TD, layout.slot_M // layout.row_TK.shape[1], layout.slot_M >= 0,
                    layout.row_TK)


def dispatch_choices(w_TK: jax.Array, layout: Layout) -> jax.Array:
    """One value per choice (its routing weight) to one value per row [M]; 0 in padding rows."""
    T, K = w_TK.shape
    rows = _to_rows(w_TK.reshape(T * K, 1), layout.slot_M, layout.slot_M >= 0,
                    layout.row_TK.reshape(T * K, 1))
    return rows.reshape(-1)


def combine(y_MD: jax.Array, layout: Layout) -> jax.Array:
    """Sums each token's rows [M, D] to [T, D], in FP32, in the order of its choices."""
    return _to_tokens(y_MD, layout.slot_M // layout.row_TK.shape[1], layout.slot_M >= 0,
                      layout.row_TK)


def _gather_rows(x_TD, token_M, real_M):
    return jnp.where(real_M[:, None], x_TD[jnp.maximum(token_M, 0)], jnp.zeros((), x_TD.dtype))


def _gather_sum(y_MD, row_TK):
    total = y_MD[row_TK[:, 0]].astype(jnp.float32)
    for k in range(1, row_TK.shape[1]):
        total = total + y_MD[row_TK[:, k]].astype(jnp.float32)
    return total.astype(y_MD.dtype)


@jax.custom_vjp
def _to_rows(x_TD, token_M, real_M, row_TK):
    return _gather_rows(x_TD, token_M, real_M)


def _to_rows_fwd(x_TD, token_M, real_M, row_TK):
    return _gather_rows(x_TD, token_M, real_M), row_TK


def _to_rows_bwd(row_TK, g_MD):
    return _gather_sum(g_MD, row_TK), None, None, None


_to_rows.defvjp(_to_rows_fwd, _to_rows_bwd)


@jax.custom_vjp
def _to_tokens(y_MD, token_M, real_M, row_TK):
    return _gather_sum(y_MD, row_TK)


def _to_tokens_fwd(y_MD, token_M, real_M, row_TK):
    return _gather_sum(y_MD, row_TK), (token_M, real_M)


def _to_tokens_bwd(residuals, g_TD):
    token_M, real_M = residuals
    return _gather_rows(g_TD, token_M, real_M), None, None, None


_to_tokens.defvjp(_to_tokens_fwd, _to_tokens_bwd)
