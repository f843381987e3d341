"""Programs for a Hopper GPU made on a machine without one."""

import jax
import pytest

from experiments.planning import targets
from sharding.hardware import cluster

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
TPU = jax.sharding.AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu")
A100 = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu")


def on(device):
    """Context in which the target is this device."""
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def program(function, *shapes) -> str:
    """Text of the program that one device of a mesh of Hopper GPUs runs."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), auto, abstract_device=HOPPER)
    spec = jax.sharding.PartitionSpec
    local = jax.shard_map(
        function, mesh=mesh, in_specs=spec("data"), out_specs=spec("data"), check_vma=True
    )
    twice = lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)
    shapes = jax.tree.map(twice, shapes)
    return jax.jit(local).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(text: str) -> int:
    """Number of Mosaic GPU kernels in a program."""
    return text.count("@mosaic_gpu_v2")


def optimized_for_cuda(function, *shapes) -> str:
    """The program that XLA's compiler for CUDA makes, which needs no GPU; skips without it."""
    reason = targets.missing("gpu")
    if reason is not None:
        pytest.skip(reason)
    here = jax.sharding.SingleDeviceSharding(targets.devices(cluster("h200x1"), "gpu")[0])
    jitted = jax.jit(function, in_shardings=here, out_shardings=here)
    return jitted.lower(*shapes).compile().as_text()
