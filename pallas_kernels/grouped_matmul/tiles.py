"""Shape of a block's work in the grouped BF16 products."""

import dataclasses
from typing import ClassVar

from pallas_kernels import pipeline

WARPGROUPS = 2
ROWS = 64 * WARPGROUPS
DEPTH = 64


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Shape of a block's work; 227 KiB of shared memory bound the stages and the store buffers.

    Columns that are no multiple of 64 serve only weights whose last dimension is contracted.
    """

    columns: int = 256
    stages: int = 4
    # Columns and number of the pieces in which a warpgroup stores its rows.
    store_columns: int = 64
    store_buffers: int = 2
    # Row tiles of a band that is walked column by column, for the L2 cache.
    band: int = 16
    pair: bool = True
    warpgroups: ClassVar[int] = WARPGROUPS
    memory_registers: ClassVar[int] = 40

    def __post_init__(self):
        # A pair fetches the columns in halves.
        step = 16 if self.pair else 8
        if self.columns % step or not step <= self.columns <= 256:
            raise ValueError(f"{self.columns=} must be a multiple of {step} up to 256")
        pipeline.check_store(self)
