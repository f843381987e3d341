"""Experts' block-scaled FP8 products: by rows, by contraction, and `grouped_linear` with both."""

from pallas_kernels.grouped_matmul_fp8.api import by_contraction, by_rows, grouped_linear

__all__ = ["by_contraction", "by_rows", "grouped_linear"]
