"""Blocks, stages and warpgroups of quantising kernels, as found on one NVIDIA H200.

Written by `bench tune quantize`; a form that is not here follows the rules in hopper.py.
"""

from pallas_kernels.quantize_fp8 import tiles

# Form.key.
TILES: dict[tuple[int, ...], tiles.Tiles] = {}
