"""Putting arrays where the letter tables say, and running functions on local shards.

Model code is written for one device. It says `shard(x_BTD, "BTD")` at few places and wraps what
is or will be a kernel in `local`; without a mesh both do nothing.
"""

import contextvars
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sharding.rules import ACTIVATIONS, BATCH_AXES, COMPUTE, STORE, Table, spec, weight_spec


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


_scheme: contextvars.ContextVar[Scheme | None] = contextvars.ContextVar("scheme", default=None)


def current_scheme() -> Scheme:
    """The scheme the computation is being traced for."""
    return _scheme.get() or Scheme()


def current_mesh() -> AbstractMesh | None:
    """The mesh the computation is being traced for, or None on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def under_mesh(
    fn: Callable, mesh: jax.sharding.Mesh | None, scheme: Scheme | None = None
) -> Callable:
    """`fn`, traced with `mesh` as the current mesh and `scheme` as the way to use it."""
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def traced(*args, **kwargs):
        token = _scheme.set(scheme)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return fn(*args, **kwargs)
        finally:
            _scheme.reset(token)

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


def batch_is_split() -> bool:
    """Whether several devices have tokens of a batch, so that gradients are summed over them."""
    mesh = current_mesh()
    return mesh is not None and any(mesh.shape[axis] > 1 for axis in BATCH_AXES)


def local(fn: Callable, signature: str, *, whole: str = "") -> Callable:
    """`fn` on local shards: `local(product, "BTD,FD->BTF")(x_BTD, w_FD)`.

    Operands with a B or T are activations, the others weights (compute table). Letters that are
    in the operands but not in the results have been summed by `fn`; where they are split over a
    mesh axis the partial results are added up, and so are, backward, the cotangents of operands
    that several devices share. `fn` returns one array, or a tuple where the signature lists more.
    A lower-case letter is a dimension in blocks and lies where its capital does; the size of a
    letter is that in the first operand that has it, for later ones may be padded.

    Args:
      whole: letters that are never split here.
    """
    mesh = current_mesh()
    if mesh is None:
        return fn
    inputs, outputs = (side.split(",") for side in signature.split("->"))

    def on_shards(*args):
        sizes: dict[str, int] = {}
        for dims, arg in zip(inputs, args, strict=True):
            for letter, n in zip(dims, arg.shape, strict=True):
                sizes.setdefault(letter, n)
        in_specs = tuple(_local_spec(dims, sizes, mesh, whole) for dims in inputs)
        out_specs = tuple(_local_spec(dims, sizes, mesh, whole) for dims in outputs)
        split = {axis for entry in in_specs for axis in _axes(entry)}

        def body(*shards):
            results = fn(*(_vary(x, split) for x in shards))
            results = results if isinstance(results, tuple) else (results,)
            summed = [
                _sum_over(x, split - set(_axes(entry)))
                for x, entry in zip(results, out_specs, strict=True)
            ]
            return tuple(summed) if len(summed) > 1 else summed[0]

        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs if len(out_specs) > 1 else out_specs[0],
            check_vma=True,
        )(*args)

    return on_shards


def _local_spec(dims: str, sizes: dict[str, int], mesh, whole: str) -> PartitionSpec:
    dims = dims.upper()
    kept = "".join("_" if letter in whole else letter for letter in dims)
    shape = tuple(sizes[letter] for letter in dims)
    table: Table = ACTIVATIONS if "B" in dims or "T" in dims else COMPUTE
    return spec(kept, shape, table, mesh.shape)


def _axes(entry: PartitionSpec) -> list[str]:
    return [axis for dim in entry for axis in ((dim,) if isinstance(dim, str) else dim or ())]


def _vary(x: jax.Array, axes: set[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _sum_over(x: jax.Array, axes: set[str]) -> jax.Array:
    return jax.lax.psum(x, tuple(sorted(axes))) if axes else x


def store_shardings(tree, mesh: jax.sharding.Mesh):
    """NamedShardings of a pytree of named weights (nested dicts) by the store table."""

    def sharding(path, leaf):
        return NamedSharding(mesh, weight_spec(path[-1].key, leaf.shape, STORE, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)
