"""Fat trees of two and three layers, and several of them side by side as planes.

Switches are numbered leaves first, then the layers above; endpoints follow their leaves.
"""

import numpy as np

from sharding.network.topology import Topology


def two_layer_fat_tree(ports: int = 64, leaves: int | None = None) -> Topology:
    """Leaves with half their ports down and half up, to as few spines as have ports for them all.

    Full: ports leaves, ports^2 / 2 endpoints, 3 ports / 2 switches, ports^2 / 2 cables, one from
    every leaf to every spine. With fewer leaves, several cables lead from a leaf to a spine.
    """
    half = half_of(ports)
    leaves = ports if leaves is None else leaves
    if not 1 <= leaves <= ports:
        raise ValueError(f"{leaves=} must be from 1 to {ports=}: a spine has a port for each leaf")
    spines, cables = _tops(leaves, half)
    leaf_C, spine_C, _ = (x.ravel() for x in np.indices((leaves, spines, cables)))
    return Topology(
        name=f"two-layer fat tree of {leaves} leaves",
        ports=ports,
        num_switches=leaves + spines,
        switch_E=np.repeat(np.arange(leaves, dtype=np.int32), half),
        ends_C2=np.stack((leaf_C, leaves + spine_C), axis=1).astype(np.int32),
    )


def three_layer_fat_tree(ports: int = 64, pods: int | None = None) -> Topology:
    """Pods of ports/2 leaves and ports/2 aggregation switches under as few cores as suffice.

    Full: ports pods, ports^3 / 4 endpoints, 5 ports^2 / 4 switches, ports^3 / 2 cables.
    """
    half = half_of(ports)
    pods = ports if pods is None else pods
    if not 1 <= pods <= ports:
        raise ValueError(f"{pods=} must be from 1 to {ports=}: a core has a port for each pod")
    leaves = pods * half
    pod_C, leaf_C, middle_C = (x.ravel() for x in np.indices((pods, half, half)))
    lower_C2 = np.stack((pod_C * half + leaf_C, leaves + pod_C * half + middle_C), axis=1)
    # Aggregation switch m of every pod is joined to the same cores, those of group m.
    cores, cables = _tops(pods, half)
    pod_C, middle_C, core_C, _ = (x.ravel() for x in np.indices((pods, half, cores, cables)))
    upper_C2 = np.stack(
        (leaves + pod_C * half + middle_C, 2 * leaves + middle_C * cores + core_C), axis=1
    )
    return Topology(
        name=f"three-layer fat tree of {pods} pods",
        ports=ports,
        num_switches=2 * leaves + half * cores,
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


def half_of(ports: int) -> int:
    """Ports of a leaf that go down, and as many up."""
    if ports < 2 or ports % 2:
        raise ValueError(f"{ports=} must be even and at least 2: half of a leaf's ports go up")
    return ports // 2


def _tops(below: int, half: int) -> tuple[int, int]:
    """Switches on top of `below` switches with `half` cables up each, and cables to each of them.

    None on top of a single one, which reaches all there is.
    """
    if below == 1:
        return 0, 0
    tops = next(n for n in range(1, half + 1) if half % n == 0 and below * (half // n) <= 2 * half)
    return tops, half // tops
