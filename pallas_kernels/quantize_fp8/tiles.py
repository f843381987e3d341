"""How the work of quantising by rows and columns is laid out on an SM."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Blocks on an SM, tiles that each has in flight, and warpgroups that share a tile.

    227 KiB of shared memory and 64 Ki registers of an SM bound the blocks: one that does not fit
    runs after the others, which costs more than it brings. In re-tiling all warpgroups of an SM are
    one block and share no tile.
    """

    blocks: int = 2
    stages: int = 2
    warpgroups: int = 1

    def __post_init__(self):
        if self.blocks < 1 or self.stages < 1:
            raise ValueError(f"{self.blocks=} and {self.stages=} must be positive")
        if self.warpgroups not in (1, 2):
            raise ValueError(f"{self.warpgroups=} must be 1 or 2")
