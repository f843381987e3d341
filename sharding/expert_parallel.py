"""Dispatch and combine: tokens to the rows of their experts, and the experts' rows back to tokens.

A path leads from a device's tokens to the rows of its experts: one hop over the expert axis, or
two, first between nodes and then inside one, then the sort by expert. A token is sent once to each
target of a hop, whatever number of its experts lives there, and on the way back its rows are
summed before each hop.

Dispatch moves pytrees of per-token arrays and knows no format: what a token consists of is sent as
one row of 4-byte words. Combine moves rows in the format of a hop's results. They are each other's
transpose, so forward and backward move rows to places known beforehand, by all-to-alls between
devices: nothing is added up with atomics, and results do not depend on the order in which devices
run.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.exchange import (
    AXIS,
    Hop,
    Results,
    all_to_all,
    as_they_are,
    axis_hops,
    exchange_rows,
    odd,
    place_in,
    send_tokens,
    values_of,
    words_of,
)
from sharding.placement import current_scheme
from sharding.row_layout import (
    Layout,
    arrives,
    gather_rows,
    gather_sum,
    once_each,
    plan_blocks,
    plan_rows,
    within,
)


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
        ids_TK = within(ids_TK, jax.lax.axis_index(AXIS), held)
    scope = num_experts
    for hop in hops:
        size = len(hop.groups[0])
        scope //= size
        tokens = ids_TK.shape[0]
        bound = tokens if room is None else min(tokens, math.ceil(room * even / size))
        bound = odd(bound) if hop.ragged else bound
        layout = plan_blocks(once_each(jnp.where(ids_TK < 0, -1, ids_TK // scope), size),
                             size, bound)
        if hop.ragged:
            layout = layout._replace(arriving_E=all_to_all(layout.group_sizes_E, hop))
        layouts.append(layout)
        # Absent rows become 0, so experts are counted from 1 on the way.
        ids_TK = _forward(ids_TK + 1, (layout,), (hop,)) - 1
        if hop.ragged:
            ids_TK = jnp.where(arrives(layout)[:, None], ids_TK, -1)
        ids_TK = within(ids_TK, place_in(hop), scope)
    most = ids_TK.shape[0] * min(ids_TK.shape[1], held)
    bound = most if room is None else min(most, math.ceil(room * even))
    layouts.append(plan_rows(ids_TK, held, alignment, bound=bound))
    return Path(tuple(layouts), hops)


def send(tree: Any, path: Path) -> Any:
    """Rows of per-token arrays [T, ...], as they are; padding rows are 0. Has no gradient."""
    return _forward(tree, path.layouts, path.hops)


def cross(tree: Any, path: Path) -> jax.Array:
    """What `send` leaves to be sorted by expert: rows of 4-byte words after the last hop."""
    words = [words_of(leaf) for leaf in jax.tree.leaves(tree)]
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


def combine(y_MD: jax.Array, path: Path, gradient_wire: Wire = PLAIN) -> jax.Array:
    """Sums each token's rows [M, D] to [T, D].

    Sums are FP32, in the order of the choices or of a hop's targets, and rounded to y's dtype
    before each hop. The gradient travels as dispatched tokens do.
    """
    return _to_tokens(path.hops, gradient_wire, y_MD, path.layouts)


def _forward(tree, layouts, hops):
    """Sends the rows of all arrays together from hop to hop, and gathers them by what is left."""
    leaves, structure = jax.tree.flatten(tree)
    words = [words_of(leaf) for leaf in leaves]
    if hops:
        # The sort takes none of the rows that hold nothing.
        crossed = _cross(words, layouts, hops, blank=len(layouts) == len(hops))
        widths = [part.shape[1] for part in words[:-1]]
        words = jnp.split(crossed, list(itertools.accumulate(widths)), axis=1)
    for layout in layouts[len(hops) :]:
        words = [gather_rows(part, layout) for part in words]
    return structure.unflatten(values_of(*each) for each in zip(words, leaves, strict=True))


def _cross(words, layouts, hops, *, blank: bool):
    """What a token consists of, side by side in a row of words, on the devices of its experts.

    Args:
      blank: rows that hold nothing are 0; otherwise, and where they do not travel, they hold
        anything.
    """
    words = jnp.concatenate(words, axis=1)
    for layout, hop in zip(layouts, hops, strict=False):
        words = send_tokens(words, hop, layout, blank=blank)
    return words


def _backward(y_MD, layouts, hops):
    """Exchanges rows back and sums them, layout by layout."""
    for index in reversed(range(len(layouts))):
        layout = layouts[index]
        if index < len(hops):
            hop = hops[index]
            back = functools.partial(exchange_rows, hop=hop, layout=layout, back=True)
            y_MD = hop.results(y_MD, back)
        y_MD = gather_sum(y_MD, layout.row_TK)
    return y_MD


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
