"""The mesh axes of the project, and how a mesh is made from devices."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# data: replicas; fsdp: the batch is split and so are stored weights; expert: the batch is split
# and experts live apart; tensor: heads, ffn hidden and vocabulary are split.
AXES = ("data", "fsdp", "expert", "tensor")


def all_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of all axes in the order of AXES: 1 for those that are not named."""
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (all of them by default) with every axis of AXES, size 1 ones kept.

    Axes not named in `sizes` are 1, except that `data` takes the devices that are left.

    Raises:
      ValueError: an axis that does not exist, or sizes whose product is not the device count.
    """
    devices = list(jax.devices() if devices is None else devices)
    for axis, size in sizes.items():
        if axis not in AXES:
            raise ValueError(f"unknown mesh axis {axis!r}: the axes are {', '.join(AXES)}")
        if size < 1:
            raise ValueError(f"mesh axis {axis}={size} must be at least 1")
    named = math.prod(sizes.values())
    if "data" not in sizes:
        sizes["data"] = max(len(devices) // named, 1)
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh {shape} needs {math.prod(sizes.values())} devices, there are {len(devices)}"
        )
    shape = tuple(all_axes(sizes).values())
    return Mesh(
        np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def expert_nodes(sizes: Mapping[str, int], devices_per_node: int) -> int:
    """Nodes that the expert axis of a mesh spans, whose neighbouring devices share a node.

    Raises:
      ValueError: nodes begin and end inside what belongs together.
    """
    tensor, expert = sizes["tensor"], sizes["expert"]
    if expert * tensor <= devices_per_node:
        whole, nodes = devices_per_node % (expert * tensor) == 0, 1
    else:
        whole = devices_per_node % tensor == 0 and expert * tensor % devices_per_node == 0
        nodes = expert * tensor // devices_per_node
    if math.prod(sizes.values()) > devices_per_node and not whole:
        raise ValueError(
            f"nodes of {devices_per_node} devices cut the mesh's expert={expert} x "
            f"tensor={tensor}: one must divide the other (--devices-per-node)"
        )
    return nodes if whole else 1
