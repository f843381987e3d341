"""Putting arrays where the letter tables say, and running functions on local shards.

Model code is written for one device. It says `shard(x_BTD, "BTD")` at few places and wraps what
is or will be a kernel in `local`; without a mesh both do nothing.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sharding.rules import ACTIVATIONS, COMPUTE, STORE, Table, spec, weight_spec


def current_mesh() -> AbstractMesh | None:
    """The mesh the computation is being traced for, or None on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def under_mesh(fn: Callable, mesh: jax.sharding.Mesh | None) -> Callable:
    """`fn`, traced with `mesh` as the current mesh."""
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args, **kwargs)

    return traced


def shard(x: jax.Array, letters: str) -> jax.Array:
    """Constrains an activation to lie where the activation table puts its letters."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, x.shape, ACTIVATIONS, mesh.shape))


def local(fn: Callable, signature: str, *, whole: str = "") -> Callable:
    """`fn` on local shards: `local(product, "BTD,FD->BTF")(x_BTD, w_FD)`.

    Operands with a B or T are activations, the others weights (compute table). Letters that are
    in the operands but not in the results have been summed by `fn`; where they are split over a
    mesh axis the partial results are added up, and so are, backward, the cotangents of operands
    that several devices share. `fn` returns one array, or a tuple where the signature lists more.

    Args:
      whole: letters that are never split here.
    """
    mesh = current_mesh()
    if mesh is None:
        return fn
    inputs, outputs = (side.split(",") for side in signature.split("->"))

    def on_shards(*args):
        sizes = {letter: n for dims, arg in zip(inputs, args, strict=True)
                 for letter, n in zip(dims, arg.shape, strict=True)}
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
