"""Tiles of grouped BF16 products, as found on one NVIDIA H200 in November 2026.

Written by `bench tune grouped`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels.grouped_matmul import tiles

# (rows a group, N, K).
TILES: dict[tuple[int, ...], tiles.Tiles] = {}

# (rows a group, N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tiles.Tiles] = {}
