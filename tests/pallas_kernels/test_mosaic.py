"""The target device is the mesh's, then the default one."""

import jax

from pallas_kernels.mosaic import Target, target


def test_without_a_mesh_it_is_the_default_device():
    assert target().platform == jax.devices()[0].platform


def test_the_mesh_in_scope_decides():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target() == Target("gpu", "NVIDIA H200", 132)
        assert target().is_hopper
