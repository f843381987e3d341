"""What the kernels of hopper.py and retiling.py are asked for."""

import dataclasses

from pallas_kernels.quantize_fp8.encode import TILE


@dataclasses.dataclass(frozen=True)
class Form:
    """What is quantised, and which layouts leave.

    inputs: 1, or 2 for silu(input 0) * input 1. codes: the input is FP8 with scales [k, M], and
    leaves by columns alone. by_row, by_column: FP32 factors. masked: rows of each 128 from a count
    on are taken as 0. keep: the inputs leave by rows too, which goes with `rows` alone.
    """

    inputs: int = 1
    codes: bool = False
    by_row: bool = False
    by_column: bool = False
    masked: bool = False
    rows: bool = True
    columns: bool = False
    power_of_two: bool = False
    keep: bool = False

    @property
    def plain(self) -> bool:
        """The values are those of the operand in memory."""
        return not (self.inputs == 2 or self.by_row or self.by_column)

    @property
    def made(self) -> bool:
        """The products of the transposed layout read values that are not those in memory."""
        return self.columns and (self.masked or not self.plain)

    @property
    def key(self) -> tuple[int, ...]:
        """What decides how the form is best laid out."""
        flags = (self.codes, self.by_column, self.rows, self.columns, self.keep)
        return (self.inputs, *map(int, flags))

    @property
    def one_piece(self) -> bool:
        """A tile leaves as one piece of 64 rows."""
        return not (self.columns or self.keep)

    @property
    def height(self) -> int:
        """Rows of a tile: those that share a scale of the transposed layout, or a warpgroup's."""
        return TILE if self.columns else 64
