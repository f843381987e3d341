"""How long a small message takes: end to end over one switch, and what every switch adds.

Figures of table 5 of the paper (ISCA): 64 bytes, measured from the CPU. A path across leaves
crosses two switches more than one below a single leaf.
"""

from typing import NamedTuple

import numpy as np


class Latency(NamedTuple):
    """Seconds of a message of 64 bytes."""

    same_leaf: float
    per_switch: float  # each switch beyond the first

    def of(self, switches: int | np.ndarray):
        """Over a path of that many switches.

        >>> round(INFINIBAND.of(3) * 1e6, 2), round(ROCE.of(3) * 1e6, 2)
        (3.7, 5.6)
        """
        return self.same_leaf + self.per_switch * (switches - 1)


INFINIBAND = Latency(2.8e-6, 0.45e-6)
ROCE = Latency(3.6e-6, 1.0e-6)
NVLINK = Latency(3.33e-6, 0.0)
