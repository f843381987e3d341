"""FP8 codes and scales: 1 x 128 tiles, 128 x 128 blocks, fused with what makes the values."""

from pallas_kernels.quantize_fp8.api import (
    Blocks,
    SwigluGradient,
    Tiles,
    quantize_blocks,
    quantize_tiles,
    retile,
    rms_norm_tiles,
    swiglu_gradient_tiles,
    swiglu_tiles,
)

__all__ = [
    "Blocks",
    "SwigluGradient",
    "Tiles",
    "quantize_blocks",
    "quantize_tiles",
    "retile",
    "rms_norm_tiles",
    "swiglu_gradient_tiles",
    "swiglu_tiles",
]
