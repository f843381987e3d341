"""Block-scaled FP8 products: forward, input gradient, weight gradient, and `linear` with all."""

from pallas_kernels.matmul_fp8.api import linear, matmul, weight_gradient

__all__ = ["linear", "matmul", "weight_gradient"]
