"""Fat trees of two and three layers, and several of them side by side as planes.

Switches are numbered leaves first, then the layers above; endpoints follow their leaves.
"""

import numpy as np

from sharding.network.topology import Topology


def two_layer_fat_tree(ports: int = 64, leaves: int | None = None) -> Topology:
    """Leaves with half their ports down, every leaf joined once to every one of ports/2 spines.

    Full: ports leaves, ports^2 / 2 endpoints, 3 ports / 2 switches, ports^2 / 2 cables.
    """
    half = _half(ports)
    leaves = ports if leaves is None else leaves
    if not 1 <= leaves <= ports:
        raise ValueError(f"{leaves=} must be from 1 to {ports=}: a spine has a port for each leaf")
    leaf_C, spine_C = _pairs(leaves, half)
    return Topology(
        name=f"two-layer fat tree of {leaves} leaves",
        ports=ports,
        num_switches=leaves + half,
        switch_E=np.repeat(np.arange(leaves, dtype=np.int32), half),
        ends_C2=np.stack((leaf_C, leaves + spine_C), axis=1).astype(np.int32),
    )


def three_layer_fat_tree(ports: int = 64, pods: int | None = None) -> Topology:
    """Pods of ports/2 leaves and ports/2 aggregation switches under (ports/2)^2 cores.

    Full: ports pods, ports^3 / 4 endpoints, 5 ports^2 / 4 switches, ports^3 / 2 cables.
    """
    half = _half(ports)
    pods = ports if pods is None else pods
    if not 1 <= pods <= ports:
        raise ValueError(f"{pods=} must be from 1 to {ports=}: a core has a port for each pod")
    leaves = pods * half
    pod_C, leaf_C, middle_C = (x.ravel() for x in np.indices((pods, half, half)))
    lower_C2 = np.stack((pod_C * half + leaf_C, leaves + pod_C * half + middle_C), axis=1)
    # Aggregation switch m of every pod is joined to cores m * half ... m * half + half - 1.
    pod_C, middle_C, core_C = pod_C, leaf_C, middle_C
    upper_C2 = np.stack(
        (leaves + pod_C * half + middle_C, 2 * leaves + middle_C * half + core_C), axis=1
    )
    return Topology(
        name=f"three-layer fat tree of {pods} pods",
        ports=ports,
        num_switches=2 * leaves + half * half,
        switch_E=np.repeat(np.arange(leaves, dtype=np.int32), half),
        ends_C2=np.concatenate((lower_C2, upper_C2)).astype(np.int32),
    )


def planes_of(plane: Topology, planes: int = 8) -> Topology:
    """Equal networks side by side, joined nowhere: a multi-plane network (ISCA section 5.1)."""
    if planes < 1:
        raise ValueError(f"{planes=} must be at least 1")
    offset_P = np.arange(planes, dtype=np.int32) * plane.num_switches
    return Topology(
        name=f"{planes} planes, each a {plane.name}",
        ports=plane.ports,
        num_switches=planes * plane.num_switches,
        switch_E=(plane.switch_E[None] + offset_P[:, None]).reshape(-1),
        ends_C2=(plane.ends_C2[None] + offset_P[:, None, None]).reshape(-1, 2),
    )


def _half(ports: int) -> int:
    if ports < 2 or ports % 2:
        raise ValueError(f"{ports=} must be even and at least 2: half of a leaf's ports go up")
    return ports // 2


def _pairs(left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(left), right), np.tile(np.arange(right), left)
