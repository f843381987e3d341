"""The target device, and how programs hold kernels."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels.mosaic import Target, launch, load, target, varying_like
from tests.pallas_kernels.lowering import kernels_in, program


def test_without_a_mesh_it_is_the_default_device():
    assert target().platform == jax.devices()[0].platform


def test_the_mesh_in_scope_decides():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target() == Target("gpu", "NVIDIA H200", 132)
        assert target().is_hopper


def test_a_kernel_that_the_backward_pass_calls_again_is_in_the_program_once():
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    @jax.jit
    def launcher(x):
        return launch(lambda x_gmem, y_gmem: None, name="nothing", out_type=shape)(x)

    @jax.custom_vjp
    def op(x):
        return varying_like(x, launcher(x))

    op.defvjp(lambda x: (op(x), op(x)), lambda saved, dy: (dy * saved,))
    step = jax.grad(lambda x: jax.checkpoint(op)(op(x)).sum())
    assert kernels_in(program(step, shape)) == 1


def test_a_reduction_over_warps_is_refused():
    def body(x_gmem, y_gmem, x_smem, full):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, full)
        plgpu.barrier_wait(full)
        y_gmem[0] = jnp.max(load(x_smem, plgpu.Layout.WGMMA.reduce(1)), axis=0)

    shape = jax.ShapeDtypeStruct((64,), jnp.float32)
    scratch = [plgpu.SMEM((64,), jnp.float32), plgpu.Barrier()]
    kernel = launch(body, name="largest", out_type=shape, scratch_types=scratch)
    with pytest.raises(ValueError, match="reduction scratch"):
        jax.jit(kernel).trace(shape).lower(lowering_platforms=("cuda",))
