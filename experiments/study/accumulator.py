"""Hopper's FP8 accumulation bit by bit: what a tensor core keeps of a sum, what promotion mends.

A WGMMA adds 32 products to its accumulator at a time. All 33 numbers are aligned to the largest
exponent among them, cut off after `fraction_bits` bits, and added exactly; the sum is cut off after
as many bits of its own. With 13 bits that is the FP22 of ISCA section 3.1.1. Promotion adds the
accumulator to an FP32 register after every so many elements and starts it anew.
"""

import ml_dtypes
import numpy as np

GROUP = 32  # products that one instruction adds
F8 = ml_dtypes.float8_e4m3fn


def accumulate(
    a_MK: np.ndarray, b_NK: np.ndarray, *, fraction_bits: int = 13, promote: int | None = None
) -> np.ndarray:
    """The product [M, N] of FP8 operands as the tensor core sums it.

    Args:
      promote: elements of the contraction between additions to FP32, a multiple of 32.
    """
    num_elements = a_MK.shape[1]
    if num_elements % GROUP or (promote is not None and promote % GROUP):
        raise ValueError(f"K={num_elements} and {promote=} must be multiples of {GROUP}")
    a_MK, b_NK = np.asarray(a_MK, np.float64), np.asarray(b_NK, np.float64)
    total_MN = np.zeros((len(a_MK), len(b_NK)), np.float32)
    sum_MN = np.zeros(total_MN.shape)
    for start in range(0, num_elements, GROUP):
        chosen = slice(start, start + GROUP)
        products_MNt = a_MK[:, None, chosen] * b_NK[None, :, chosen]
        largest_MN = np.maximum(np.abs(products_MNt).max(2), np.abs(sum_MN))
        place_MN = last_place(largest_MN, fraction_bits)
        sum_MN = cut(products_MNt, place_MN[..., None]).sum(2) + cut(sum_MN, place_MN)
        sum_MN = cut(sum_MN, last_place(sum_MN, fraction_bits))
        if promote is not None and (start + GROUP) % promote == 0:
            total_MN += sum_MN.astype(np.float32)
            sum_MN = np.zeros_like(sum_MN)
    return total_MN + sum_MN


def last_place(x: np.ndarray, fraction_bits: int) -> np.ndarray:
    """The value of the last bit kept of numbers as large as x; 1 for zeros."""
    return np.where(x == 0, 1.0, np.ldexp(1.0, np.frexp(x)[1] - 1 - fraction_bits))


def cut(x: np.ndarray, place: np.ndarray) -> np.ndarray:
    """x without what lies below a place, toward zero."""
    return np.trunc(x / place) * place


def operands(kind: str, rows: int, num_elements: int, seed: int = 0) -> list[np.ndarray]:
    """Two matrices in E4M3: "zero-mean" (normal) or "positive" (uniform from 0 to 1)."""
    rng = np.random.default_rng(seed)
    draw = {"zero-mean": rng.standard_normal, "positive": lambda shape: rng.uniform(size=shape)}
    return [draw[kind]((rows, num_elements)).astype(F8).astype(np.float64) for _ in range(2)]


def relative_error(
    kind: str, *, fraction_bits: int = 13, promote: int | None = None, num_elements: int = 4096,
    rows: int = 16,
) -> float:  # fmt: skip
    """||sum - exact|| / ||exact|| of a product of random operands."""
    a_MK, b_NK = operands(kind, rows, num_elements)
    exact_MN = a_MK @ b_NK.T
    found_MN = accumulate(a_MK, b_NK, fraction_bits=fraction_bits, promote=promote)
    return float(np.linalg.norm(found_MN - exact_MN) / np.linalg.norm(exact_MN))
