"""Dragonfly: fully joined groups of switches, groups joined to each other by long cables."""

import numpy as np

from sharding.network.topology import Topology


def dragonfly(
    *, per_switch: int = 16, group_size: int = 32, global_ports: int = 16,
    groups: int | None = None, ports: int = 64,
) -> Topology:  # fmt: skip
    """`groups` groups of `group_size` switches, each with `global_ports` cables to other groups.

    Canonical: group_size = 2 per_switch = 2 global_ports. At most group_size * global_ports + 1
    groups, the default, where every two groups share one cable; with fewer, ports that are left
    double the cables to the nearest groups.
    """
    largest = group_size * global_ports + 1
    groups = largest if groups is None else groups
    if not 2 <= groups <= largest:
        raise ValueError(
            f"{groups=} must be from 2 to {largest}: a group has {group_size} x {global_ports} "
            "cables to others"
        )
    a, b = np.triu_indices(group_size, 1)
    group = np.arange(groups)[:, None] * group_size
    local = np.stack(((group + a).ravel(), (group + b).ravel()), axis=1)
    across = []
    used = 0  # global ports of a group that have a cable, the same in every group
    for offset in _offsets(groups, largest - 1):
        # Port number n of a group is on its switch n // global_ports. Half way round, both
        # ends of a cable have the same offset, so it takes one port of a group, not two.
        here = np.arange(groups // 2 if 2 * offset == groups else groups)
        back = used if 2 * offset == groups else used + 1
        across.append(
            np.stack(
                (here * group_size + used // global_ports,
                 (here + offset) % groups * group_size + back // global_ports),
                axis=1,
            )
        )  # fmt: skip
        used = back + 1
    return Topology(
        name=f"dragonfly of {groups} groups",
        ports=ports,
        num_switches=groups * group_size,
        switch_E=np.repeat(np.arange(groups * group_size, dtype=np.int32), per_switch),
        ends_C2=np.concatenate((local, *across)).astype(np.int32),
    )


def _offsets(groups: int, global_ports: int):
    """How far round the ring of groups the cables of a group reach, until its ports are used."""
    left = global_ports
    while left:
        for offset in range(1, groups // 2 + 1):
            needs = 1 if 2 * offset == groups else 2
            if needs > left:
                return
            left -= needs
            yield offset
