"""Experts' products in BF16 or FP32: rows sorted by group times one matrix a group."""

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.groups import (
    group_of_block,
    group_starts,
    is_real_row,
    padded_sizes,
)

__all__ = ["group_of_block", "group_starts", "grouped_matmul", "is_real_row", "padded_sizes"]
