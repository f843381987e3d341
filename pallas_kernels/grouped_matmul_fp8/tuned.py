"""Tiles of grouped FP8 products, as found on one NVIDIA H200 in November 2026.

Written by `bench tune grouped`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels import block_scaled, tile_scaled

# (rows a group, N, K).
TILES: dict[tuple[int, ...], block_scaled.Tiles] = {}

# (rows a group, N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tile_scaled.Tiles] = {}
