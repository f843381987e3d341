"""Where rows lie: each choice's row among those of its expert, or of a hop's targets.

A layout is planned from the ids of choices alone. Arrays are laid out by it, gathered by it, and
their rows summed back to tokens; nothing is added up with atomics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """Where each choice of each token goes. M rows; a choice is an expert or a target of a hop."""

    slot_M: jax.Array  # int32: t * K + k of the choice in this row, -1 in rows without one
    row_TK: jax.Array  # int32: the row of each choice, -1 for those that have none
    group_sizes_E: jax.Array  # int32: rows of each group without padding
    lost: jax.Array  # int32: choices that found no room
    arriving_E: jax.Array | None = None  # int32: of a hop, rows that come from each device


def plan_rows(
    expert_TK: jax.Array, num_experts: int, alignment: int, *, bound: int | None = None
) -> Layout:
    """Lays the choices out by expert, in token order inside an expert; those of -1 have no row.

    Groups start at multiples of the alignment. M is the static `bound` on rows (T * K) and, for
    each group that can be non-empty, alignment - 1, rounded up.
    """
    most = expert_TK.size if bound is None else bound
    M = most + min(num_experts, most) * (alignment - 1)
    M = (M + alignment - 1) // alignment * alignment

    def offsets(sizes_E):
        padded_E = (sizes_E + alignment - 1) // alignment * alignment
        return jnp.cumsum(padded_E) - padded_E, jnp.full_like(sizes_E, M)

    return _plan(expert_TK, num_experts, M, offsets)


def plan_blocks(target_TK: jax.Array, num_targets: int, bound: int) -> Layout:
    """Lays the choices out in one block of `bound` rows for each target; those of -1 have none."""

    def offsets(sizes_E):
        start_E = jnp.arange(num_targets, dtype=jnp.int32) * bound
        return start_E, start_E + bound

    return _plan(target_TK, num_targets, num_targets * bound, offsets)


def _plan(group_TK, num_groups: int, M: int, offsets) -> Layout:
    T, K = group_TK.shape
    group = jnp.where(group_TK < 0, num_groups, group_TK).reshape(T * K).astype(jnp.int32)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    group = group[order]
    # Compared with all at once: a search step by step would be a loop of small kernels.
    ids = jnp.arange(num_groups + 1, dtype=jnp.int32)
    bounds = jnp.searchsorted(group, ids, method="compare_all")
    starts_E, sizes_E = bounds[:-1].astype(jnp.int32), jnp.diff(bounds).astype(jnp.int32)
    offset_E, limit_E = offsets(sizes_E)
    own = jnp.minimum(group, num_groups - 1)
    number = jnp.arange(T * K, dtype=jnp.int32)
    row = offset_E[own] + number - starts_E[own]
    real = group < num_groups
    fits = real & (row < limit_E[own])
    # Rows past the end are dropped; no two are the same, so that the indices stay unique.
    slot_M = jnp.full((M,), -1, jnp.int32).at[jnp.where(fits, row, M + number)].set(
        order, unique_indices=True, mode="drop"
    )
    row_TK = jnp.zeros((T * K,), jnp.int32).at[order].set(
        jnp.where(fits, row, -1), unique_indices=True
    )
    return Layout(
        slot_M,
        row_TK.reshape(T, K),
        jnp.clip(limit_E - offset_E, 0, sizes_E),
        jnp.sum(real & ~fits, dtype=jnp.int32),
    )


def within(ids, block, size: int):
    """Ids counted from the start of a block of `size`; -1 for those outside."""
    local = ids - block * size
    return jnp.where((local >= 0) & (local < size), local, -1)


def once_each(ids_TK, num_ids: int):
    """The different ids of each row, in no more columns than can hold one; -1 in the others."""
    K = ids_TK.shape[1]
    if num_ids < K:
        ids_E = jnp.arange(num_ids, dtype=ids_TK.dtype)[None]
        return jnp.where(jnp.any(ids_TK[:, :, None] == ids_E[None], axis=1), ids_E, -1)
    same = ids_TK[:, :, None] == ids_TK[:, None, :]
    return jnp.where(jnp.any(same & jnp.tri(K, K, -1, bool)[None], axis=-1), -1, ids_TK)


def token_M(layout: Layout):
    """The token of each row; below 0 where there is none."""
    return layout.slot_M // layout.row_TK.shape[1]


def arrives(layout: Layout):
    """Which rows of a hop hold something where they arrive."""
    targets = layout.arriving_E.shape[0]
    row_1M = jnp.arange(layout.slot_M.shape[0] // targets, dtype=jnp.int32)[None]
    return (row_1M < layout.arriving_E[:, None]).reshape(-1)


def lay_out(x_TW, layout: Layout, *, blank: bool):
    """Each token in the row of each target: read once, and rows without one are not written."""
    (T, K), M, W = layout.row_TK.shape, layout.slot_M.shape[0], x_TW.shape[1]
    # Rows past the end are dropped; no two are the same, so that the indices stay unique.
    past_TK = M + jnp.arange(T * K, dtype=jnp.int32).reshape(T, K)
    row_TK = jnp.where(layout.row_TK < 0, past_TK, layout.row_TK)
    rows_MW = jnp.zeros((M, W), x_TW.dtype) if blank else empty((M, W), x_TW)
    return rows_MW.at[row_TK].set(
        jnp.broadcast_to(x_TW[:, None, :], (T, K, W)), unique_indices=True, mode="drop"
    )


def gather_rows(x_TW, layout: Layout):
    """The token of each row; 0 in rows without one."""
    real_M1 = (layout.slot_M >= 0)[:, None]
    rows_MW = x_TW[jnp.maximum(token_M(layout), 0)]
    return jnp.where(real_M1, rows_MW, jnp.zeros((), x_TW.dtype))


def gather_sum(y_MD, row_TK):
    """The sum of each token's rows in FP32, in the order of its choices; y's dtype returned."""
    # Once for all columns: XLA would make a kernel for each.
    real_TK = jax.lax.optimization_barrier(row_TK >= 0)
    rows = lambda k: jnp.where(
        real_TK[:, k, None], y_MD[jnp.maximum(row_TK[:, k], 0)].astype(jnp.float32), 0.0
    )
    total = rows(0)
    for k in range(1, row_TK.shape[1]):
        total = total + rows(k)
    return total.astype(y_MD.dtype)


def empty(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """An array that holds anything, of the type of another and varying over the same axes."""
    x, axes = jax.lax.empty(shape, like.dtype), jax.typeof(like).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
