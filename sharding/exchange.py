"""Exchanges of rows over the expert axis: one all-to-all for each hop, whole or ragged.

What a token consists of is one row of 4-byte words, so that it travels at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.row_layout import Layout, empty, lay_out, token_M

AXIS = "expert"

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


def axis_hops(ranks: int, nodes: int) -> tuple[Hop, ...]:
    """The hops over an expert axis of `ranks` devices, consecutive ones in a node."""
    inside = ranks // nodes
    across = Hop(tuple(tuple(range(i, ranks, inside)) for i in range(inside)))
    within = Hop(tuple(tuple(range(n * inside, (n + 1) * inside)) for n in range(nodes)))
    return tuple(hop for hop in (across, within) if len(hop.groups[0]) > 1)


def expert_device() -> jax.Array:
    """The number of this device along the expert axis."""
    return jax.lax.axis_index(AXIS)


def place_in(hop: Hop) -> jax.Array:
    """This device's place among those of its group."""
    places = {rank: place for group in hop.groups for place, rank in enumerate(group)}
    table = jnp.asarray([places[rank] for rank in range(len(places))], jnp.int32)
    return table[jax.lax.axis_index(AXIS)]


def words_of(x: jax.Array) -> jax.Array:
    """Rows [T, ...] of any type as words of 4 bytes [T, W], with zeros up to a whole word.

    A kernel of XLA's handles 4 elements at a time, whatever their size: 16 bytes this way.
    """
    rows, size = x.reshape(x.shape[0], -1), x.dtype.itemsize
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (4 // size))))
    if size < 4:
        rows = rows.reshape(rows.shape[0], -1, 4 // size)
    return jax.lax.bitcast_convert_type(rows, jnp.uint32)


def values_of(words: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `words_of`, for rows of the type and shape of those of `like`."""
    rows = jax.lax.bitcast_convert_type(words, like.dtype).reshape(words.shape[0], -1)
    return rows[:, : math.prod(like.shape[1:])].reshape(-1, *like.shape[1:])


def send_tokens(words_TW: jax.Array, hop: Hop, layout: Layout, *, blank: bool) -> jax.Array:
    """Tokens to the devices of a hop, laid out for it or straight from where they lie.

    Args:
      blank: rows that hold nothing are 0; otherwise, and where they do not travel, they hold
        anything.
    """
    if hop.ragged and is_written_by_peers(hop):
        return ragged_all_to_all(words_TW, hop, layout, gather=True)
    return exchange_rows(lay_out(words_TW, layout, blank=blank), hop, layout)


def exchange_rows(x: jax.Array, hop: Hop, layout: Layout, *, back: bool = False) -> jax.Array:
    """The exchange of an array laid out for a hop, there or back."""
    if hop.ragged:
        return ragged_all_to_all(x, hop, layout, back=back)
    return all_to_all(x, hop)


def all_to_all(x, hop: Hop):
    return jax.lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=hop.groups, tiled=True)


def ragged_all_to_all(x, hop: Hop, layout: Layout, *, back: bool = False, gather: bool = False):
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
    place_G = jnp.full_like(start_G, block) * place_in(hop)
    updates = (start_G, sent_G, place_G, arriving_G)
    if is_written_by_peers(hop):
        # Each row is an update.
        row_1M = jnp.arange(block, dtype=jnp.int32)[None]
        offsets = lambda first_G: (first_G[:, None] + row_1M).reshape(-1)
        sizes = lambda size_G: (row_1M < size_G[:, None]).astype(jnp.int32).reshape(-1)
        start_M = jnp.maximum(token_M(layout), 0) if gather else offsets(start_G)
        updates = (start_M, sizes(sent_G), offsets(place_G), sizes(arriving_G))
    return jax.lax.ragged_all_to_all(
        x, empty((targets * block, *x.shape[1:]), x), *updates, axis_name=AXIS,
        axis_index_groups=hop.groups,
    )  # fmt: skip


def is_written_by_peers(hop: Hop) -> bool:
    """Whether XLA has a kernel that writes rows into the memory of the other devices.

    It does for up to 8 GPUs of one process. A block of threads copies an update, so that updates
    must be many: with one for each device 2 GPUs were seen to send 2.9 GB/s. Each row is one
    instead, and tokens go straight from where they lie. Elsewhere every update is a message.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_gpu = device is not None and device.platform == "gpu"
    return on_gpu and len(hop.groups[0]) <= 8 and jax.process_count() == 1


def odd(rows: int) -> int:
    """At least so many rows, and an odd number, times a power of two beyond 65,535.

    XLA's kernel halves the number of updates while it is even, and the blocks that halves leave
    share the updates of each other, one after the other. It has 65,535 blocks for a device.
    """
    twos = 1
    while rows > 65_535 * twos:
        twos *= 2
    return (-(-rows // twos) | 1) * twos
