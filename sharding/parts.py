"""Functions on the part of each device, for programs that measure what devices exchange."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.placement import Scheme, under_mesh


def placing(mesh: Mesh, axis: str) -> NamedSharding:
    """The first dimension of an array over the devices of an axis."""
    return NamedSharding(mesh, PartitionSpec(axis))


def on_parts(function: Callable, mesh: Mesh, axis: str, scheme: Scheme) -> Callable:
    """`function` of the parts of arrays on a device, whose results are again parts.

    All arrays are split in their first dimension. Scalars differ from device to device, and are
    arrays of one element a device outside.
    """

    def body(*parts):
        made = function(*parts)
        return jax.tree.map(lambda x: x.reshape(1) if x.ndim == 0 else x, made)

    spec = PartitionSpec(axis)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return under_mesh(mapped, mesh, scheme)
