"""The target device, and how programs hold kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import Target, launch, target, varying_like
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
