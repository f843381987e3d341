"""Meshes from axis sizes, and the sizes that are refused."""

import jax
import pytest
from jax.sharding import AxisType

from sharding import AXES, make_mesh
from sharding.mesh import all_axes, expert_nodes


def test_every_axis_is_there_and_data_takes_what_is_left():
    mesh = make_mesh(fsdp=2, tensor=2)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}


def test_axes_that_are_not_named_are_1_and_all_stand_in_one_order():
    assert list(all_axes({"tensor": 2, "data": 4}).items()) == [
        ("data", 4), ("fsdp", 1), ("expert", 1), ("tensor", 2)
    ]  # fmt: skip


def test_axes_are_automatic():
    assert set(make_mesh().axis_types) == {AxisType.Auto}


def test_a_mesh_of_chosen_devices():
    mesh = make_mesh(jax.devices()[:2], tensor=2)
    assert mesh.size == 2 and mesh.shape["tensor"] == 2
    assert make_mesh(jax.devices()[:1]).size == 1


def test_neighbouring_devices_share_the_tensor_axis():
    mesh = make_mesh(fsdp=4, tensor=2)
    first = mesh.devices.reshape(4, 2)
    assert [[device.id for device in row] for row in first] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_an_unknown_axis_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown mesh axis 'model'.*data, fsdp, expert, tensor"):
        make_mesh(model=2)


def test_an_axis_below_1_is_refused():
    with pytest.raises(ValueError, match="mesh axis fsdp=0 must be at least 1"):
        make_mesh(fsdp=0)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 2, "fsdp": 2}, "mesh data=2 x fsdp=2 needs 4 devices, there are 8"),
        ({"tensor": 3}, "mesh tensor=3 x data=2 needs 6 devices, there are 8"),
        ({"tensor": 16}, "needs 16 devices, there are 8"),
    ],
    ids=["too-few", "does-not-divide", "too-many"],
)
def test_sizes_that_do_not_make_up_the_devices_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@pytest.mark.parametrize(
    "expert, tensor, per_node, nodes",
    [(8, 1, 8, 1), (8, 1, 4, 2), (8, 2, 8, 2), (4, 2, 8, 1), (64, 1, 8, 8), (2, 1, 8, 1)],
)
def test_the_nodes_that_the_expert_axis_spans(expert, tensor, per_node, nodes):
    sizes = {"data": 1, "fsdp": 4, "expert": expert, "tensor": tensor}
    assert expert_nodes(sizes, per_node) == nodes


def test_nodes_that_cut_what_belongs_together_are_refused():
    with pytest.raises(ValueError, match="nodes of 6 devices cut the mesh's expert=4 x tensor=1"):
        expert_nodes({"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}, 6)
