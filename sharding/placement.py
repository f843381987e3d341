"""Putting arrays where the letter tables say, and running functions on local shards.

Model code is written for one device. It says `shard(x_BTD, "BTD")` at few places and wraps what
is or will be a kernel in `local`; without a mesh both do nothing.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sharding.rules import (
    ACTIVATIONS,
    COMPUTE,
    PRODUCTS,
    STORE,
    Table,
    spec,
    weight_spec,
)

GATHERED = "gathered"


@dataclass(frozen=True)
class Scheme:
    """How a mesh is used, beyond the sizes of its axes."""

    # 3: weights rest in their stored shards and are gathered layer by layer; 1: masters and
    # moments are sharded, and the step begins by gathering whole weights over the batch axes.
    zero: Literal[1, 3] = 3
    # Nodes that the expert axis spans; dispatch then crosses their boundary in a hop of its own.
    expert_nodes: int = 1
    # Rows in the buffers of dispatch, in multiples of those of an even load. None: any load fits.
    room: float | None = None
    # Only rows that hold tokens travel between devices, not whole buffers; no CPU can do it.
    ragged: bool = False
    # Of each layer of experts, those of MTP last: the expert in each place, equally many places on
    # each device of the expert axis. None: every expert has one place, in order.
    placement: tuple[tuple[int, ...], ...] | None = None


_scheme: contextvars.ContextVar[Scheme | None] = contextvars.ContextVar("scheme", default=None)


def current_scheme() -> Scheme:
    """The scheme the computation is being traced for."""
    return _scheme.get() or Scheme()


def current_mesh() -> AbstractMesh | None:
    """The mesh the computation is being traced for, or None on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


@contextlib.contextmanager
def scope(mesh: jax.sharding.Mesh | None, scheme: Scheme | None = None) -> Iterator[None]:
    """Computations traced inside are for `mesh`, used as `scheme` says.

    Without a mesh it stays that of an outer scope; outside of all there is a single device.
    """
    token = _scheme.set(scheme)
    try:
        if mesh is None:
            yield
        else:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                yield
    finally:
        _scheme.reset(token)


def under_mesh(
    fn: Callable, mesh: jax.sharding.Mesh | None, scheme: Scheme | None = None
) -> Callable:
    """`fn`, traced with `mesh` as the current mesh and `scheme` as the way to use it."""
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def traced(*args, **kwargs):
        with scope(mesh, scheme):
            return fn(*args, **kwargs)

    return traced


def shard(x: jax.Array, letters: str) -> jax.Array:
    """Constrains an activation to lie where the activation table puts its letters."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, x.shape, ACTIVATIONS, mesh.shape))


def is_split(x: jax.Array, letters: str, axis: str) -> bool:
    """Whether the activation table splits an array over a mesh axis."""
    mesh = current_mesh()
    return mesh is not None and axis in _axes(spec(letters, x.shape, ACTIVATIONS, mesh.shape))


def on_several_devices() -> bool:
    """Whether the mesh has several devices: then tokens are split and gradients are sums over them.

    Those of the tensor axis have different parts of a sequence.
    """
    mesh = current_mesh()
    return mesh is not None and mesh.size > 1


def local(
    fn: Callable,
    signature: str,
    *,
    whole: str = "",
    again: bool = True,
    stored: bool = False,
) -> Callable:
    """`fn` on local shards: `local(product, "BTD,FD->BTF")(x_BTD, w_FD)`.

    Operands with a B or T are activations, the others weights. What rests in more pieces than `fn`
    works on is gathered first: weights over the batch axes, and sequences over the tensor axis
    where `fn` splits something else over it. Letters that are in the operands but not in the
    results have been summed by `fn`; where they are split over a mesh axis the partial results are
    added up, each device keeping its piece of the sequence. Backward, cotangents are added up over
    the devices that share an operand, in their own dtype. `fn` returns one array, or a tuple where
    the signature lists more. On one device it is called as it is.

    Args:
      whole: letters that `fn` needs whole; of T only the tensor axis is taken off.
      again: gather once more backward rather than keep; False where the gradient of `fn` needs
        nothing of what was gathered.
      stored: `fn` works on each piece of weights as it is stored, and makes pieces of its results.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return fn
    inputs, outputs = (side.split(",") for side in signature.split("->"))

    def on_shards(*args):
        sizes: dict[str, int] = {}
        for dims, arg in zip(inputs, args, strict=True):
            for letter, n in zip(dims, arg.shape, strict=True):
                # Of the first operand that has the letter: codes come later and may be padded.
                sizes.setdefault(letter, n)
        place = functools.partial(_spec, sizes=sizes, mesh=mesh, whole=whole)
        # The tensor axis splits the sequence only where it splits nothing else.
        busy = any("tensor" in _axes(place(dims, PRODUCTS)) for dims in [*inputs, *outputs])
        table = PRODUCTS if busy or "T" in whole else ACTIVATIONS
        table = STORE if stored else table
        work = [place(dims, table) for dims in inputs]
        rest = work if stored else [_spec_at_rest(dims, sizes, mesh) for dims in inputs]
        split = {axis for entries in work for axis in _axes(entries)}
        sequence = "tensor" in split and "T" not in whole and not stored
        results = [place(dims, ACTIVATIONS if sequence else table) for dims in outputs]

        def body(*shards):
            operands = [_gather(*each, split) for each in zip(shards, rest, work, strict=True)]
            made = fn(*(_vary(x, split) for x in operands))
            made = made if isinstance(made, tuple) else (made,)
            summed = [
                _sum_over(x, split, place(dims, table), entries)
                for x, dims, entries in zip(made, outputs, results, strict=True)
            ]
            return tuple(summed) if len(summed) > 1 else summed[0]

        # What was gathered is not kept for the backward pass but gathered again.
        keep = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        if again and rest != work:
            body = jax.checkpoint(body, policy=keep, prevent_cse=False)
        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=tuple(rest),
            out_specs=tuple(results) if len(results) > 1 else results[0],
            check_vma=True,
        )(*args)

    return on_shards


def _spec(dims: str, table: Table, *, sizes, mesh, whole: str = "") -> PartitionSpec:
    """Where an operand or result lies. A lower-case letter is split as its upper-case one is."""
    if not _is_activation(dims):
        table = COMPUTE if table in (PRODUCTS, ACTIVATIONS) else table
    letters = dims.upper()
    shape = tuple(sizes.get(dim.upper(), sizes.get(dim)) for dim in dims)
    kept = "".join("_" if letter in whole and letter != "T" else letter for letter in letters)
    return spec(kept, shape, table, mesh.shape)


def _spec_at_rest(dims: str, sizes, mesh) -> PartitionSpec:
    """Where an operand lies outside: weights in stored shards, but for small ones and scales."""
    if _is_activation(dims):
        return _spec(dims, ACTIVATIONS, sizes=sizes, mesh=mesh)
    small = len(dims.replace("L", "")) < 2 or dims != dims.upper()
    stored = current_scheme().zero == 3 and not small
    return _spec(dims, STORE if stored else COMPUTE, sizes=sizes, mesh=mesh)


def _is_activation(dims: str) -> bool:
    return "B" in dims or "T" in dims


def _axes(entries: PartitionSpec) -> list[str]:
    return [axis for entry in entries for axis in _axes_of(entry)]


def _axes_of(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _gather(x: jax.Array, rest: PartitionSpec, work: PartitionSpec, split: set[str]) -> jax.Array:
    """A shard at work from shards at rest; the pieces of a dimension lie in the order of its axes.

    Where devices of an axis compute the same, what they gather over it is the same on all.
    """
    # Before the gather, so that cotangents are scattered first and only then added up over copies.
    x = _vary(x, split - set(_axes(rest)))
    for dim, (held, wanted) in enumerate(zip(rest, work, strict=True)):
        held, wanted = _axes_of(held), _axes_of(wanted)
        assert held[: len(wanted)] == wanted, (rest, work)
        # The last axis counts fastest, so it is gathered first.
        for axis in reversed(held[len(wanted) :]):
            to = "varying" if axis in split else "invarying"
            x = jax.lax.all_gather(x, axis, axis=dim, tiled=True, to=to)
    return checkpoint_name(x, GATHERED) if rest != work else x


def _vary(x: jax.Array, axes: set[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _sum_over(
    x: jax.Array, split: set[str], made: PartitionSpec, wanted: PartitionSpec
) -> jax.Array:
    """Adds up what devices made of a result; along the tensor axis each keeps its sequence."""
    axes = split - set(_axes(made))
    for dim, (before, after) in enumerate(zip(made, wanted, strict=True)):
        for axis in _axes_of(after)[len(_axes_of(before)) :]:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
            axes -= {axis}
    return jax.lax.psum(x, tuple(sorted(axes))) if axes else x


def stored_shape(
    letters: str, shape: tuple[int, ...], axis_sizes: Mapping[str, int] | None = None
) -> tuple[int, ...]:
    """The shape of a device's piece of a stored weight, whose last dimensions are the letters.

    Args:
      axis_sizes: of the mesh; the one in scope by default.
    """
    if axis_sizes is None:
        mesh = current_mesh()
        axis_sizes = {} if mesh is None else mesh.shape
    return tuple(
        n // math.prod(axis_sizes[axis] for axis in _axes_of(entry))
        for n, entry in zip(shape, spec(letters, shape, STORE, axis_sizes), strict=True)
    )


def shard_weight(x: jax.Array, letters: str) -> jax.Array:
    """Constrains what stands for a weight in a step to lie as the weight would; see `at_rest`."""
    mesh = current_mesh()
    if mesh is None:
        return x
    table = STORE if current_scheme().zero == 3 else COMPUTE
    return jax.lax.with_sharding_constraint(x, spec(letters, x.shape, table, mesh.shape))


def at_rest(tree):
    """A tree of named weights as a step keeps it: gathered over the batch axes with zero=1."""
    return _constrain(tree, STORE if current_scheme().zero == 3 else COMPUTE)


def stored(tree):
    """A tree of named weights, or of their gradients, in the shards of the state."""
    return _constrain(tree, STORE)


def _constrain(tree, table: Table):
    mesh = current_mesh()
    if mesh is None:
        return tree
    place = lambda path, leaf: jax.lax.with_sharding_constraint(
        leaf, weight_spec(path[-1].key, leaf.shape, table, mesh.shape)
    )
    return jax.tree_util.tree_map_with_path(place, tree)


def store_shardings(tree, mesh: jax.sharding.Mesh):
    """NamedShardings of a pytree of named weights (nested dicts) by the store table."""

    def sharding(path, leaf):
        return NamedSharding(mesh, weight_spec(path[-1].key, leaf.shape, STORE, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)
