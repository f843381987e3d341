"""Whether the replicas of arrays are the same to the bit, found on the devices themselves."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# Of a device, in what one program compares.
COMPARED_BYTES = 4 * 2**30


def differing_replicas(tree: Any, mesh: Mesh) -> int:
    """Elements of replicated arrays whose bits are not those of the neighbouring replica.

    Every replica is compared with the next one along each axis that the array does not lie on, in
    a ring: 0 means that all are equal. Works over several processes.
    """
    pending: list[tuple[jax.Array, PartitionSpec, tuple[str, ...]]] = []
    size, total = 0, 0
    for leaf in jax.tree.leaves(tree):
        spec = leaf.sharding.spec
        used = {axis for entry in spec if entry is not None
                for axis in ((entry,) if isinstance(entry, str) else entry)}  # fmt: skip
        free = tuple(axis for axis, n in mesh.shape.items() if n > 1 and axis not in used)
        if free:
            pending.append((leaf, spec, free))
            size += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if size >= COMPARED_BYTES:
            total, pending, size = total + _differing(pending, mesh), [], 0
    return total + (_differing(pending, mesh) if pending else 0)


def _differing(leaves: list[tuple[jax.Array, PartitionSpec, tuple[str, ...]]], mesh: Mesh) -> int:
    arrays, specs, free = zip(*leaves, strict=True)

    def compare(*shards):
        total = jnp.zeros((), jnp.int32)
        for shard, axes in zip(shards, free, strict=True):
            bits = jax.lax.bitcast_convert_type(shard, jnp.dtype(f"uint{8 * shard.dtype.itemsize}"))
            for axis in axes:
                n = mesh.shape[axis]
                other = jax.lax.ppermute(bits, axis, [(i, (i + 1) % n) for i in range(n)])
                total = total + jnp.sum(bits != other, dtype=jnp.int32)
        return jax.lax.psum(total, mesh.axis_names)

    # Replicas are what is in question, so nothing may be taken as the same on all devices.
    compared = jax.shard_map(
        compare, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return int(jax.jit(compared)(*arrays))
