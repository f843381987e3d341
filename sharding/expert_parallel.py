"""Dispatch and combine: tokens to the rows of their experts, and the experts' rows back to tokens.

A path leads from a device's tokens to the rows of its experts: one hop over the expert axis, or
two, first between nodes and then inside one, then the sort by expert. A token is sent once to each
target of a hop, whatever number of its experts lives there, and on the way back its rows are
summed before each hop.

Both directions move pytrees of per-token arrays and know no format: what a token consists of is
sent as one row of 4-byte words. They are each other's transpose, so forward and backward move rows
to places known beforehand, by all-to-alls between devices: nothing is added up with atomics, and
results do not depend on the order in which devices run.
"""

import functools
import itertools
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
        bound = _odd(bound) if hop.ragged else bound
        layout = plan_blocks(_once_each(jnp.where(ids_TK < 0, -1, ids_TK // scope), size),
                             size, bound)
        if hop.ragged:
            layout = layout._replace(arriving_E=_all_to_all(layout.group_sizes_E, hop))
        layouts.append(layout)
        # Absent rows become 0, so experts are counted from 1 on the way.
        ids_TK = _forward(ids_TK + 1, (layout,), (hop,)) - 1
        if hop.ragged:
            ids_TK = jnp.where(_arrives(layout)[:, None], ids_TK, -1)
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


def _once_each(ids_TK, num_ids: int):
    """The different ids of each row, in no more columns than can hold one; -1 in the others."""
    K = ids_TK.shape[1]
    if num_ids < K:
        ids_E = jnp.arange(num_ids, dtype=ids_TK.dtype)[None]
        return jnp.where(jnp.any(ids_TK[:, :, None] == ids_E[None], axis=1), ids_E, -1)
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


def send(tree: Any, path: Path) -> Any:
    """Rows of per-token arrays [T, ...], as they are; padding rows are 0. Has no gradient."""
    return _forward(tree, path.layouts, path.hops)


def cross(tree: Any, path: Path) -> jax.Array:
    """What `send` leaves to be sorted by expert: rows of 4-byte words after the last hop."""
    words = [_words(leaf) for leaf in jax.tree.leaves(tree)]
    return _cross(words, path.layouts, path.hops, blank=False)


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

    Sums are FP32, in the order of the choices or of a hop's targets, and rounded to y's dtype
    before each hop. The gradient travels as dispatched tokens do.
    """
    return _to_tokens(path.hops, wire, y_MD, path.layouts)


def _forward(tree, layouts, hops):
    """Sends the rows of all arrays together from hop to hop, and gathers them by what is left."""
    leaves, structure = jax.tree.flatten(tree)
    words = [_words(leaf) for leaf in leaves]
    if hops:
        # The sort takes none of the rows that hold nothing.
        crossed = _cross(words, layouts, hops, blank=len(layouts) == len(hops))
        widths = [part.shape[1] for part in words[:-1]]
        words = jnp.split(crossed, list(itertools.accumulate(widths)), axis=1)
    for layout in layouts[len(hops) :]:
        words = [_gather_rows(part, layout) for part in words]
    return structure.unflatten(_values(*each) for each in zip(words, leaves, strict=True))


def _cross(words, layouts, hops, *, blank: bool):
    """What a token consists of, side by side in a row of words, on the devices of its experts.

    Args:
      blank: rows that hold nothing are 0; otherwise, and where they do not travel, they hold
        anything.
    """
    words = jnp.concatenate(words, axis=1)
    for layout, hop in zip(layouts, hops, strict=False):
        if hop.ragged and _is_written_by_peers(hop):
            words = _ragged_all_to_all(words, hop, layout, gather=True)
        else:
            words = _exchange(_lay_out(words, layout, blank=blank), hop, layout)
    return words


def _words(x: jax.Array) -> jax.Array:
    """Rows [T, ...] of any type as words of 4 bytes [T, W], with zeros up to a whole word.

    A kernel of XLA's handles 4 elements at a time, whatever their size: 16 bytes this way.
    """
    rows, size = x.reshape(x.shape[0], -1), x.dtype.itemsize
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (4 // size))))
    if size < 4:
        rows = rows.reshape(rows.shape[0], -1, 4 // size)
    return jax.lax.bitcast_convert_type(rows, jnp.uint32)


def _values(words: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_words`, for rows of the type and shape of those of `like`."""
    rows = jax.lax.bitcast_convert_type(words, like.dtype).reshape(words.shape[0], -1)
    return rows[:, : math.prod(like.shape[1:])].reshape(-1, *like.shape[1:])


def _backward(y_MD, layouts, hops):
    """Exchanges rows back and sums them, layout by layout."""
    for index in reversed(range(len(layouts))):
        layout = layouts[index]
        if index < len(hops):
            hop = hops[index]
            back = functools.partial(_exchange, hop=hop, layout=layout, back=True)
            y_MD = hop.results(y_MD, back)
        y_MD = _gather_sum(y_MD, layout.row_TK)
    return y_MD


def _exchange(x: jax.Array, hop: Hop, layout: Layout, *, back: bool = False) -> jax.Array:
    """The exchange of an array laid out for a hop, there or back."""
    if hop.ragged:
        return _ragged_all_to_all(x, hop, layout, back=back)
    return _all_to_all(x, hop)


def _all_to_all(x, hop: Hop):
    return jax.lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=hop.groups, tiled=True)


def _ragged_all_to_all(x, hop: Hop, layout: Layout, *, back: bool = False, gather: bool = False):
    """Of a block of rows for each device of the group, those that hold something go there.

    What the others are where they would arrive is not said.

    Args:
      gather: x are tokens, in the order of which rows are not laid out yet.
    """
    targets = len(hop.groups[0])
    block = layout.slot_M.shape[0] // targets
    sent_G, arriving_G = layout.group_sizes_E, layout.arriving_E
    if back:
        sent_G, arriving_G = arriving_G, sent_G
    start_G = jnp.arange(targets, dtype=jnp.int32) * block
    place_G = jnp.full_like(start_G, block) * _place_in(hop)
    updates = (start_G, sent_G, place_G, arriving_G)
    if _is_written_by_peers(hop):
        # Each row is an update.
        row_1M = jnp.arange(block, dtype=jnp.int32)[None]
        offsets = lambda first_G: (first_G[:, None] + row_1M).reshape(-1)
        sizes = lambda size_G: (row_1M < size_G[:, None]).astype(jnp.int32).reshape(-1)
        start_M = jnp.maximum(_token_M(layout), 0) if gather else offsets(start_G)
        updates = (start_M, sizes(sent_G), offsets(place_G), sizes(arriving_G))
    return jax.lax.ragged_all_to_all(
        x, _empty((targets * block, *x.shape[1:]), x), *updates, axis_name=AXIS,
        axis_index_groups=hop.groups,
    )  # fmt: skip


def _is_written_by_peers(hop: Hop) -> bool:
    """Whether XLA has a kernel that writes rows into the memory of the other devices.

    It does for up to 8 GPUs of one process. A block of threads copies an update, so that updates
    must be many: with one for each device 2 GPUs were seen to send 2.9 GB/s. Each row is one
    instead, and tokens go straight from where they lie. Elsewhere every update is a message.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_gpu = device is not None and device.platform == "gpu"
    return on_gpu and len(hop.groups[0]) <= 8 and jax.process_count() == 1


def _odd(rows: int) -> int:
    """At least so many rows, and an odd number, times a power of two beyond 65,535.

    XLA's kernel halves the number of updates while it is even, and the blocks that halves leave
    share the updates of each other, one after the other. It has 65,535 blocks for a device.
    """
    twos = 1
    while rows > 65_535 * twos:
        twos *= 2
    return (-(-rows // twos) | 1) * twos


def _empty(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """An array that holds anything, of the type of another and varying over the same axes."""
    x, axes = jax.lax.empty(shape, like.dtype), jax.typeof(like).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _arrives(layout: Layout):
    """Which rows of a hop hold something where they arrive."""
    targets = layout.arriving_E.shape[0]
    row_1M = jnp.arange(layout.slot_M.shape[0] // targets, dtype=jnp.int32)[None]
    return (row_1M < layout.arriving_E[:, None]).reshape(-1)


def _token_M(layout: Layout):
    """The token of each row; below 0 where there is none."""
    return layout.slot_M // layout.row_TK.shape[1]


def _lay_out(x_TW, layout: Layout, *, blank: bool):
    """Each token in the row of each target: read once, and rows without one are not written."""
    (T, K), M, W = layout.row_TK.shape, layout.slot_M.shape[0], x_TW.shape[1]
    # Rows past the end are dropped; no two are the same, so that the indices stay unique.
    past_TK = M + jnp.arange(T * K, dtype=jnp.int32).reshape(T, K)
    row_TK = jnp.where(layout.row_TK < 0, past_TK, layout.row_TK)
    rows_MW = jnp.zeros((M, W), x_TW.dtype) if blank else _empty((M, W), x_TW)
    return rows_MW.at[row_TK].set(
        jnp.broadcast_to(x_TW[:, None, :], (T, K, W)), unique_indices=True, mode="drop"
    )


def _gather_rows(x_TW, layout: Layout):
    real_M1 = (layout.slot_M >= 0)[:, None]
    rows_MW = x_TW[jnp.maximum(_token_M(layout), 0)]
    return jnp.where(real_M1, rows_MW, jnp.zeros((), x_TW.dtype))


def _gather_sum(y_MD, row_TK):
    # Once for all columns: XLA would make a kernel for each.
    real_TK = jax.lax.optimization_barrier(row_TK >= 0)
    rows = lambda k: jnp.where(
        real_TK[:, k, None], y_MD[jnp.maximum(row_TK[:, k], 0)].astype(jnp.float32), 0.0
    )
    total = rows(0)
    for k in range(1, row_TK.shape[1]):
        total = total + rows(k)
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
