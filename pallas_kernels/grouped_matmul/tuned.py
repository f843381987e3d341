"""Tiles of grouped BF16 products, as found on one NVIDIA H200 in November 2026.

Written by `bench tune grouped`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels.grouped_matmul import tiles

# (rows a group, N, K).
TILES: dict[tuple[int, ...], tiles.Tiles] = {}

# (rows a group, N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tiles.Tiles] = {
    # 791 TFLOP/s, before 706 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (4096, 7168, 2048): tiles.Tiles(store_buffers=1, pair=False),
}
