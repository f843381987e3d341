"""Experts that lie in several places: their weights brought there, choices dealt out among them.

A placement is a table expert_LP: the expert in each of P places, equally many on each device of the
expert axis, device by device; weights at home lie on it in the order of experts (see
expert_placement.py, which makes such tables from loads).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sharding.exchange import AXIS
from sharding.expert_placement import placement
from sharding.placement import current_mesh


def check_placement(expert_LP: np.ndarray, *, layers: int, experts: int, devices: int) -> None:
    """Refuses a table that does not fit a model and the devices of an expert axis."""
    if expert_LP.ndim != 2 or len(expert_LP) != layers:
        raise ValueError(
            f"a placement {expert_LP.shape} must be [layers, places] for the {layers} layers of "
            "experts (those of MTP last)"
        )
    places = expert_LP.shape[1]
    if devices < 2 or places % devices or experts % devices:
        raise ValueError(
            f"a placement of {experts} experts in {places} places needs an expert axis above 1 "
            f"that divides both, not {devices}"
        )
    for layer, expert_P in enumerate(expert_LP):
        missing = set(range(experts)) - set(expert_P.tolist())
        if missing or expert_P.max() >= experts or expert_P.min() < 0:
            what = f"has no place for expert {min(missing)}" if missing else "names other experts"
            raise ValueError(f"layer {layer} of the placement {what} of {experts}")


def copy_weights(weights, expert_LP: np.ndarray):
    """A tree of arrays [L, E, ...] as [L, P, ...]: of each place, what its expert has at home.

    Only what is not at home moves. Backward, the gradients of an expert's copies are added up.
    """
    devices = current_mesh().shape[AXIS]
    expert_LP = np.asarray(expert_LP)
    experts = jax.tree.leaves(weights)[0].shape[1]
    moved = functools.partial(_move, moves=_moves(expert_LP, experts // devices, devices))
    # The other axes stay the compiler's: it knows how they split the rest.
    spec = PartitionSpec(None, AXIS)
    mapped = jax.shard_map(moved, in_specs=(spec,), out_specs=spec, axis_names={AXIS})
    return jax.tree.map(mapped, weights)


def _moves(expert_LP: np.ndarray, held: int, devices: int):
    """For each distance between devices, which experts [devices, L, c] go that far; and for each
    place [devices, L, P / devices] where its expert is in what arrives, distance after distance."""
    L, P = expert_LP.shape
    here = P // devices
    sent, begin, where = [], 0, np.zeros((devices, L, here), np.int32)
    for distance in range(devices):
        lists = [
            [
                sorted({e for e in expert_LP[i, to * here : (to + 1) * here].tolist()
                        if e // held == (to - distance) % devices})
                for i in range(L)
            ]
            for to in range(devices)
        ]  # fmt: skip
        count = max(len(row) for rows in lists for row in rows)
        if not count:
            continue
        index = np.zeros((devices, L, count), np.int32)
        for to, i in np.ndindex(devices, L):
            row = lists[to][i]
            index[(to - distance) % devices, i, : len(row)] = [e % held for e in row]
            for place in range(here):
                expert = expert_LP[i, to * here + place]
                if expert in row:
                    where[to, i, place] = begin + row.index(expert)
        sent.append((distance, index))
        begin += count
    return sent, where


def _move(w, *, moves):
    sent, where = moves
    devices, me = len(where), jax.lax.axis_index(AXIS)
    take = lambda x, index_LP: jax.vmap(lambda x, i: x[i])(x, index_LP)
    arrived = []
    for distance, index in sent:
        part = take(w, jnp.asarray(index)[me])
        pairs = [(i, (i + distance) % devices) for i in range(devices)]
        arrived.append(jax.lax.ppermute(part, AXIS, pairs) if distance else part)
    return take(jnp.concatenate(arrived, axis=1), jnp.asarray(where)[me])


def places_of(expert_LP: np.ndarray, num_experts: int) -> np.ndarray:
    """int32 [L, E, J]: the places of each expert, padded with -1."""
    return placement(np.asarray(expert_LP), num_experts).place_LEJ.astype(np.int32)


def deal(expert_TK: jax.Array, place_EJ: jax.Array, *, first: jax.Array | int) -> jax.Array:
    """A place for each choice: the copies of an expert take its choices in turn.

    Args:
      first: the copy that begins, counted around; devices that send should differ in it.
    """
    copies_E = jnp.sum(place_EJ >= 0, axis=1, dtype=jnp.int32)
    expert = expert_TK.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    start = jnp.searchsorted(expert[order], expert[order]).astype(jnp.int32)
    number = jnp.arange(expert.size, dtype=jnp.int32)
    turn = jnp.zeros_like(number).at[order].set(number - start, unique_indices=True)
    return place_EJ[expert, (turn + first) % copies_E[expert]].reshape(expert_TK.shape)
