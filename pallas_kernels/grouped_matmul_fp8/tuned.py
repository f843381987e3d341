"""Tiles of grouped FP8 products, as found on one NVIDIA H200 in November 2026.

Written by `bench tune grouped`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels import block_scaled, tile_scaled

# (rows a group, N, K).
TILES: dict[tuple[int, ...], block_scaled.Tiles] = {}

# (rows a group, N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tile_scaled.Tiles] = {
    # 632 TFLOP/s, before 609 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (1024, 4096, 7168): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24, fetch_sums=True
    ),
    # 654 TFLOP/s, before 621 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (1024, 7168, 2048): tile_scaled.Tiles(
        warpgroups=3, stages=4, store_columns=64, store_buffers=1, memory_registers=24
    ),
    # 779 TFLOP/s, before 754 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (1664, 1408, 2048): tile_scaled.Tiles(
        warpgroups=3, stages=4, store_columns=64, store_buffers=1, memory_registers=24
    ),
    # 790 TFLOP/s, before 731 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (1664, 2048, 1408): tile_scaled.Tiles(
        warpgroups=3, stages=4, store_columns=64, store_buffers=1, memory_registers=24
    ),
    # 859 TFLOP/s, before 797 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (4096, 4096, 7168): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24
    ),
    # 843 TFLOP/s, before 811 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (4096, 7168, 2048): tile_scaled.Tiles(
        warpgroups=3, stages=4, store_columns=64, store_buffers=1, memory_registers=24
    ),
}
