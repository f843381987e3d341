"""FP8 blocks of 128 x 128 on the host, as checkpoints hold them: codes in E4M3, a scale a block.

A released `weight_scale_inv` is what a code is multiplied by. Blocks at the edges are short.
"""

import ml_dtypes
import numpy as np

BLOCK = 128
LARGEST = 448.0  # of E4M3
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# The value of each of the 256 codes: looking them up is faster than converting.
VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def blocks(size: int) -> int:
    """Blocks along a dimension."""
    return -(-size // BLOCK)


def dequantize(
    codes_MK: np.ndarray, scale_mk: np.ndarray, rows: slice, columns: slice
) -> np.ndarray:
    """FP32 values of a window of a matrix: code times the scale of its block.

    Args:
      codes_MK: the whole matrix.
      scale_mk: the scales of all its blocks.
    """
    first, last, _ = rows.indices(codes_MK.shape[0])
    left, right, _ = columns.indices(codes_MK.shape[1])
    out = np.take(VALUES, codes_MK[first:last, left:right].view(np.uint8))
    column_k = np.arange(left, right) // BLOCK
    for block in range(first // BLOCK, blocks(last)):
        begin, end = max(block * BLOCK, first) - first, min((block + 1) * BLOCK, last) - first
        out[begin:end] *= scale_mk[block, column_k].astype(np.float32)[None, :]
    return out


def quantize(x_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of an FP32 matrix: scale = max(max |x| of the block, 1e-4) / 448."""
    M, K = x_MK.shape
    codes_MK = np.empty((M, K), E4M3)
    scale_mk = np.empty((blocks(M), blocks(K)), np.float32)
    for m in range(blocks(M)):
        rows = x_MK[m * BLOCK : (m + 1) * BLOCK].astype(np.float32)
        starts = np.arange(0, K, BLOCK)
        amax_k = np.maximum.reduceat(np.abs(rows).max(axis=0), starts)
        scale_mk[m] = np.maximum(amax_k, np.float32(1e-4)) / np.float32(LARGEST)
        scaled = rows / np.repeat(scale_mk[m], BLOCK)[None, :K]
        codes_MK[m * BLOCK : (m + 1) * BLOCK] = np.clip(scaled, -LARGEST, LARGEST).astype(E4M3)
    return codes_MK, scale_mk


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; small formats are asked by their bits."""
    if array.dtype == E4M3:
        return not ((array.view(np.uint8) & 0x7F) == 0x7F).any()
    if array.dtype == ml_dtypes.bfloat16:
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())
