"""A network of switches: who hangs on which switch, which cables join switches, what is broken."""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Topology:
    """Switches, the endpoints on them and the cables between them.

    Every cable is two directed links, and so is the wire of every endpoint: cable c is link 2c
    from ends_C2[c, 0] to ends_C2[c, 1] and link 2c + 1 back; endpoint e is link 2C + 2e into its
    switch and 2C + 2e + 1 out of it. Broken parts keep their numbers: a broken cable joins
    nothing, an endpoint without a switch has switch -1.
    """

    name: str
    ports: int  # of a switch
    num_switches: int
    switch_E: np.ndarray  # the switch that an endpoint hangs on
    ends_C2: np.ndarray  # the switches that a cable joins

    def __post_init__(self):
        plugs = np.concatenate((self.ends_C2.ravel(), self.switch_E))
        used_S = np.bincount(plugs[plugs >= 0], minlength=self.num_switches)
        if len(used_S) > self.num_switches:
            raise ValueError(
                f"{self.name} names switch {len(used_S) - 1}, but num_switches={self.num_switches}"
            )
        if used_S.size and used_S.max() > self.ports:
            raise ValueError(
                f"{self.name} needs {used_S.max()} ports on switch {used_S.argmax()}, "
                f"ports={self.ports}: use larger switches or fewer endpoints on each"
            )

    @property
    def num_endpoints(self) -> int:
        return len(self.switch_E)

    @property
    def num_cables(self) -> int:
        """Cables between switches, those that work."""
        return int(np.count_nonzero(self.ends_C2[:, 0] >= 0))

    @property
    def num_links(self) -> int:
        """Directed links, broken ones too."""
        return 2 * len(self.ends_C2) + 2 * len(self.switch_E)

    def link_in(self, endpoint_F: np.ndarray) -> np.ndarray:
        """The links from endpoints into their switches."""
        return 2 * len(self.ends_C2) + 2 * endpoint_F

    def link_out(self, endpoint_F: np.ndarray) -> np.ndarray:
        """The links from switches out to endpoints."""
        return 2 * len(self.ends_C2) + 2 * endpoint_F + 1

    @functools.cached_property
    def adjacency(self) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of each switch in order, and the links to them, [S, D], padded with -1."""
        cable_C = np.flatnonzero(self.ends_C2[:, 0] >= 0)
        a_C, b_C = self.ends_C2[cable_C].T
        source_L = np.concatenate((a_C, b_C))
        target_L = np.concatenate((b_C, a_C))
        link_L = np.concatenate((2 * cable_C, 2 * cable_C + 1))
        order = np.lexsort((target_L, source_L))
        degree_S = np.bincount(source_L, minlength=self.num_switches)
        start_S = np.cumsum(degree_S) - degree_S
        source_L = source_L[order]
        slot_L = np.arange(len(order)) - start_S[source_L]
        shape = (self.num_switches, max(int(degree_S.max(initial=0)), 1))
        neighbour_SD, link_SD = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        neighbour_SD[source_L, slot_L] = target_L[order]
        link_SD[source_L, slot_L] = link_L[order]
        return neighbour_SD, link_SD

    def without(self, *, switches=(), cables=(), endpoints=()) -> "Topology":
        """The same network with parts broken; a broken switch takes its cables and endpoints."""
        for what, numbers, size in (
            ("switch", switches, self.num_switches),
            ("cable", cables, len(self.ends_C2)),
            ("endpoint", endpoints, self.num_endpoints),
        ):
            for number in numbers:
                if not 0 <= number < size:
                    use = f": use 0..{size - 1}" if size else ": it has none"
                    raise ValueError(f"{self.name} has no {what} {number}{use}")
        ends_C2, switch_E = self.ends_C2.copy(), self.switch_E.copy()
        ends_C2[np.isin(ends_C2, list(switches)).any(1)] = -1
        ends_C2[list(cables)] = -1
        switch_E[np.isin(switch_E, list(switches))] = -1
        switch_E[list(endpoints)] = -1
        return dataclasses.replace(self, ends_C2=ends_C2, switch_E=switch_E)


def check_connected(topology: Topology) -> Topology:
    """The topology itself, if every endpoint reaches every other.

    Raises:
      ValueError: two endpoints with no path between them.
    """
    if (topology.switch_E < 0).any():
        raise ValueError(
            f"{topology.name} is not connected: endpoint {topology.switch_E.argmin()} hangs on no "
            "switch"
        )
    part_E = components(topology)[topology.switch_E]
    apart = np.flatnonzero(part_E != part_E[0])
    if len(apart):
        raise ValueError(
            f"{topology.name} is not connected: no path from endpoint 0 to endpoint {apart[0]}"
        )
    return topology


def components(topology: Topology) -> np.ndarray:
    """The connected part that each switch lies in, numbered by its first switch."""
    a_C, b_C = topology.ends_C2[topology.ends_C2[:, 0] >= 0].T
    part_S = np.arange(topology.num_switches)
    while True:
        before_S = part_S.copy()
        low_C = np.minimum(part_S[a_C], part_S[b_C])
        np.minimum.at(part_S, a_C, low_C)
        np.minimum.at(part_S, b_C, low_C)
        part_S = part_S[part_S]
        if np.array_equal(part_S, before_S):
            return part_S
