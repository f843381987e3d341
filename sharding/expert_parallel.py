"""Dispatch and combine: tokens to the rows of their experts, and the experts' rows back to tokens.

A path leads from a device's tokens to the rows of its experts: one hop over the expert axis, or
two, first between nodes and then inside one, then the sort by expert. A token is sent once to each
target of a hop, whatever number of its experts lives there, and on the way back its rows are
summed before each hop.

Both directions move pytrees of per-token arrays and know no format. They are each other's
transpose, so forward and backward are gathers with indices known beforehand and all-to-alls:
nothing is scattered with atomics, and results do not depend on the order in which devices run.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.placement import current_scheme

AXIS = "expert"


class Layout(NamedTuple):
    """Where each choice of each token goes. M rows; a choice is an expert or a target of a hop."""

    slot_M: jax.Array  # int32: t * K + k of the choice in this row, -1 in rows without one
    row_TK: jax.Array  # int32: the row of each choice, -1 for those that have none
    group_sizes_E: jax.Array  # int32: rows of each group without padding
    lost: jax.Array  # int32: choices that found no room
    arriving_E: jax.Array | None = None  # int32: of a hop, rows that come from each device


# How rows go back over a hop: from rows and the exchange of an array to the rows that arrive.
Results = Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array]


def as_they_are(y_MD: jax.Array, exchange: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Rows go back in the format that they have."""
    return exchange(y_MD)


class Hop(NamedTuple):
    """An exchange over the expert axis, among the given groups of its devices."""

    groups: tuple[tuple[int, ...], ...]
    ragged: bool = False  # whether only rows that hold something travel
    results: Results = as_they_are


class Path(NamedTuple):
    """From a device's tokens to the rows of its experts; the last layout is the sort by expert."""

    layouts: tuple[Layout, ...]
    hops: tuple[Hop, ...]  # one less

    @property
    def rows(self) -> Layout:
        return self.layouts[-1]

    @property
    def lost(self) -> jax.Array:
        """Choices that found no room on the way: the results are then of no use."""
        return sum(layout.lost for layout in self.layouts)


class Wire(NamedTuple):
    """How dispatched arrays travel: encode(x_TD) gives the pytree that is sent, decode its rows."""

    encode: Callable[[jax.Array], Any] = lambda x: x
    decode: Callable[[Any], jax.Array] = lambda x: x


PLAIN = Wire()


def plan_path(
    expert_TK: jax.Array,
    num_experts: int,
    alignment: int,
    *,
    held: int,
    exchanged: bool = True,
    results: Results = as_they_are,
) -> Path:
    """The path of a device's tokens, with the room that the scheme in scope gives.

    Args:
      held: experts on each device.
      results: the format in which rows, and in the backward pass their gradients, go back.
      exchanged: whether tokens are split over the expert axis. Where they are copies instead,
        each device takes the choices of its own experts, and results are summed over the axis.
    """
    room, ids_TK = current_scheme().room, expert_TK
    even = expert_TK.size  # choices of a device, and, with an even load, rows of a device
    layouts: list[Layout] = []
    hops = axis_hops(num_experts // held, current_scheme().expert_nodes) if exchanged else ()
    ragged = current_scheme().ragged
    hops = tuple(hop._replace(ragged=ragged, results=results) for hop in hops)
    if num_experts > held and not exchanged:
        ids_TK = _within(ids_TK, jax.lax.axis_index(AXIS), held)
    scope = num_experts
    for hop in hops:
        size = len(hop.groups[0])
        scope //= size
        tokens = ids_TK.shape[0]
        bound = tokens if room is None else min(tokens, math.ceil(room * even / size))
        layout = plan_blocks(_first_of_each(jnp.where(ids_TK < 0, -1, ids_TK // scope)),
                             size, bound)
        if hop.ragged:
            layout = layout._replace(arriving_E=_all_to_all(layout.group_sizes_E, hop))
        layouts.append(layout)
        # Absent rows become 0, so experts are counted from 1 on the way.
        ids_TK = _forward(ids_TK + 1, (layout,), (hop,)) - 1
        ids_TK = _within(ids_TK, _place_in(hop), scope)
    most = ids_TK.shape[0] * min(ids_TK.shape[1], held)
    bound = most if room is None else min(most, math.ceil(room * even))
    layouts.append(plan_rows(ids_TK, held, alignment, bound=bound))
    return Path(tuple(layouts), hops)


def expert_device() -> jax.Array:
    """The number of this device along the expert axis."""
    return jax.lax.axis_index(AXIS)


def axis_hops(ranks: int, nodes: int) -> tuple[Hop, ...]:
    """The hops over an expert axis of `ranks` devices, consecutive ones in a node."""
    inside = ranks // nodes
    across = Hop(tuple(tuple(range(i, ranks, inside)) for i in range(inside)))
    within = Hop(tuple(tuple(range(n * inside, (n + 1) * inside)) for n in range(nodes)))
    return tuple(hop for hop in (across, within) if len(hop.groups[0]) > 1)


def _place_in(hop: Hop) -> jax.Array:
    """This device's place among those of its group."""
    places = {rank: place for group in hop.groups for place, rank in enumerate(group)}
    table = jnp.asarray([places[rank] for rank in range(len(places))], jnp.int32)
    return table[jax.lax.axis_index(AXIS)]


def _within(ids, block, size: int):
    """Ids counted from the start of a block of `size`; -1 for those outside."""
    local = ids - block * size
    return jnp.where((local >= 0) & (local < size), local, -1)


def _first_of_each(ids_TK):
    """-1 in place of what has occurred earlier in its row."""
    K = ids_TK.shape[1]
    same = ids_TK[:, :, None] == ids_TK[:, None, :]
    return jnp.where(jnp.any(same & jnp.tri(K, K, -1, bool)[None], axis=-1), -1, ids_TK)


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
    bounds = jnp.searchsorted(group, jnp.arange(num_groups + 1, dtype=jnp.int32))
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


def send(tree: Any, path: Path) -> Any:
    """Rows of per-token arrays [T, ...], as they are; padding rows are 0. Has no gradient."""
    return _forward(tree, path.layouts, path.hops)


def dispatch(x_TD: jax.Array, path: Path, wire: Wire = PLAIN) -> jax.Array:
    """Rows [M, D] of the tokens that chose this device's experts; padding rows are 0."""
    return _to_rows(path.hops, wire, x_TD, path.layouts)


def dispatch_choices(w_TK: jax.Array, path: Path) -> jax.Array:
    """One value per choice (its routing weight) to one value per row [M]; 0 in padding rows."""
    # The gradients of choices, a number each, go back as they are.
    hops = tuple(hop._replace(results=as_they_are) for hop in path.hops)
    w_TK = _to_rows(hops, PLAIN, w_TK, path.layouts[:-1])
    T, K = w_TK.shape
    each = path.rows._replace(row_TK=path.rows.row_TK.reshape(T * K, 1))
    return _to_rows((), PLAIN, w_TK.reshape(T * K, 1), (each,)).reshape(-1)


def combine(y_MD: jax.Array, path: Path, wire: Wire = PLAIN) -> jax.Array:
    """Sums each token's rows [M, D] to [T, D].

    Sums are FP32, in the order of the choices, and rounded to y's dtype before each hop. The
    gradient travels as dispatched tokens do.
    """
    return _to_tokens(path.hops, wire, y_MD, path.layouts)


def _forward(tree, layouts, hops):
    """Gathers rows and exchanges them, layout by layout."""
    for index, layout in enumerate(layouts):
        tree = jax.tree.map(functools.partial(_gather_rows, layout=layout), tree)
        if index < len(hops):
            tree = jax.tree.map(_exchanger(hops[index], layout), tree)
    return tree


def _backward(y_MD, layouts, hops):
    """Exchanges rows back and sums them, layout by layout."""
    for index in reversed(range(len(layouts))):
        if index < len(hops):
            hop = hops[index]
            y_MD = hop.results(y_MD, _exchanger(hop, layouts[index], back=True))
        y_MD = _gather_sum(y_MD, layouts[index].row_TK)
    return y_MD


def _exchanger(hop: Hop, layout: Layout, *, back: bool = False) -> Callable:
    """The exchange of arrays laid out for a hop, there or back."""
    if not hop.ragged:
        return functools.partial(_all_to_all, hop=hop)
    sizes = layout.group_sizes_E, layout.arriving_E
    sent_G, arriving_G = reversed(sizes) if back else sizes
    return lambda x: _ragged_all_to_all(x, hop, sent_G, arriving_G)


def _ragged_all_to_all(x, hop: Hop, sent_G, arriving_G):
    """Of a block of rows for each device of the group, those that hold something go there."""
    block = x.shape[0] // len(hop.groups[0])
    starts_G = jnp.arange(len(hop.groups[0]), dtype=jnp.int32) * block
    empty = jnp.where(jnp.zeros(x.shape, bool), x, jnp.zeros((), x.dtype))
    own_G = jnp.full_like(starts_G, block) * _place_in(hop)
    return jax.lax.ragged_all_to_all(
        x, empty, starts_G, sent_G, own_G, arriving_G, axis_name=AXIS,
        axis_index_groups=hop.groups,
    )


def _all_to_all(x, hop: Hop):
    return jax.lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=hop.groups, tiled=True)


def _gather_rows(x, layout: Layout):
    token_M = layout.slot_M // layout.row_TK.shape[1]
    real_M = (layout.slot_M >= 0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(real_M, x[jnp.maximum(token_M, 0)], jnp.zeros((), x.dtype))


def _gather_sum(y_MD, row_TK):
    rows = lambda row_T: jnp.where(
        (row_T >= 0)[:, None], y_MD[jnp.maximum(row_T, 0)].astype(jnp.float32), 0.0
    )
    total = rows(row_TK[:, 0])
    for k in range(1, row_TK.shape[1]):
        total = total + rows(row_TK[:, k])
    return total.astype(y_MD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_rows(hops, wire, x_TD, layouts):
    return wire.decode(_forward(wire.encode(x_TD), layouts, hops))


def _to_rows_fwd(hops, wire, x_TD, layouts):
    return _to_rows(hops, wire, x_TD, layouts), layouts


def _to_rows_bwd(hops, wire, layouts, g_MD):
    return _backward(g_MD, layouts, hops), None


_to_rows.defvjp(_to_rows_fwd, _to_rows_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_tokens(hops, wire, y_MD, layouts):
    return _backward(y_MD, layouts, hops)


def _to_tokens_fwd(hops, wire, y_MD, layouts):
    return _backward(y_MD, layouts, hops), layouts


def _to_tokens_bwd(hops, wire, layouts, g_TD):
    return wire.decode(_forward(wire.encode(g_TD), layouts, hops)), None


_to_tokens.defvjp(_to_tokens_fwd, _to_tokens_bwd)
