"""Tiles of grouped FP8 products, as found on one NVIDIA H200 in November 2026.

Written by `bench tune grouped`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels import block_scaled, tile_scaled

# (rows a group, N, K).
TILES: dict[tuple[int, ...], block_scaled.Tiles] = {}

# (rows a group, N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tile_scaled.Tiles] = {
    # 652 TFLOP/s, 3 x 96 617; NVIDIA H200, 2026-11-25, commit fd7fe05.
    (1024, 4096, 7168): tile_scaled.Tiles(
        3, 128, 3, 128, 1, band=16, memory_registers=24, fetch_sums=True
    ),
    # 665 TFLOP/s, 3 x 128 616; NVIDIA H200, 2026-11-25, commit fd7fe05.
    (1024, 7168, 2048): tile_scaled.Tiles(3, 96, 4, 96, 1, band=16, memory_registers=24),
    # 924 TFLOP/s, 3 x 96 815; NVIDIA H200, 2026-11-25, commit fd7fe05.
    (4096, 7168, 2048): tile_scaled.Tiles(3, 128, 4, band=16, memory_registers=24),
}
