"""Replicas that differ in a bit are found, whichever device has them."""

import jax
import numpy as np

from sharding.mesh import make_mesh
from sharding.replicas import differing_replicas


def test_replicas_of_other_bits_are_counted():
    devices = make_mesh(jax.devices()[:4], data=2, fsdp=2)
    where = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("fsdp"))
    whole = np.arange(12, dtype=np.float32).reshape(6, 2)

    def made(change):
        shards = []
        for device, part in where.devices_indices_map(whole.shape).items():
            shard = whole[part].copy()
            if change and device == jax.devices()[3]:
                shard[0] = -0.0, 5.0
            shards.append(jax.device_put(shard, device))
        return jax.make_array_from_single_device_arrays(whole.shape, where, shards)

    assert differing_replicas([made(False)], devices) == 0
    # Each of the two elements differs from the neighbour on both sides.
    assert differing_replicas([made(False), made(True)], devices) == 4
