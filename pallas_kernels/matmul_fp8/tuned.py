"""Tiles of dense FP8 products for the shapes of V3, as found on one NVIDIA H200 in November 2026.

Written by `bench tune gemm`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels import block_scaled, tile_scaled

# (N, K), for more than 128 rows.
TILES: dict[tuple[int, ...], block_scaled.Tiles] = {
    (2112, 7168): block_scaled.Tiles(band=16),
    (24576, 1536): block_scaled.Tiles(store_columns=64, store_buffers=1),
    (32768, 512): block_scaled.Tiles(store_columns=64, store_buffers=1),
    (7168, 2048): block_scaled.Tiles(band=7),
    (7168, 16384): block_scaled.Tiles(band=7),
}

# (rows, N, K), for 64 rows and for 128.
FEW: dict[tuple[int, ...], block_scaled.Tiles] = {
    # 588 TFLOP/s with one in flight, cuBLASLt 535.
    (128, 24576, 1536): block_scaled.Tiles(2, 64, 8, pair=False, memory_registers=40, in_flight=2),
}

# (N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tile_scaled.Tiles] = {
    # 868 TFLOP/s, 3 x 96 778; NVIDIA H200, 2026-11-25, commit fd7fe05.
    (7168, 2048): tile_scaled.Tiles(3, 128, 4, band=16, memory_registers=24),
    # 938 TFLOP/s, 3 x 96 866; NVIDIA H200, 2026-11-25, commit fd7fe05.
    (24576, 1536): tile_scaled.Tiles(3, 128, 4, band=16, memory_registers=24),
    # 813 TFLOP/s, 3 x 96 776; NVIDIA H200, 2026-11-25, commit fd7fe05.
    (32768, 512): tile_scaled.Tiles(3, 128, 4, band=16, memory_registers=24),
}
