"""Tiles of grouped BF16 products that are faster on an H200 than the rules in hopper.py: none yet.

Written by `bench tune grouped`.
"""

from pallas_kernels.grouped_matmul import tiles

# (rows a group, N, K).
TILES: dict[tuple[int, ...], tiles.Tiles] = {}

# (rows a group, N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tiles.Tiles] = {}
