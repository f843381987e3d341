"""Tiles of grouped FP8 products, as found on one NVIDIA H200.

Written by `bench tune grouped`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels import block_scaled, tile_scaled

# (rows a group, N, K).
TILES: dict[tuple[int, ...], block_scaled.Tiles] = {
    # 1238 TFLOP/s, before 1076 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (1024, 2048, 7168): block_scaled.Tiles(
        warpgroups=2, stages=6, band=16, memory_registers=40, in_flight=2, round=8
    ),
    # 1146 TFLOP/s, before 1109 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (1024, 4096, 7168): block_scaled.Tiles(
        warpgroups=2, stages=6, band=16, memory_registers=40, in_flight=2, round=8
    ),
    # 1099 TFLOP/s, before 1046 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (1024, 7168, 2048): block_scaled.Tiles(
        warpgroups=2, stages=6, band=16, memory_registers=40, in_flight=2, round=8
    ),
    # 1129 TFLOP/s, before 1082 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (1024, 7168, 4096): block_scaled.Tiles(
        warpgroups=2, stages=6, band=16, memory_registers=40, in_flight=2, round=8
    ),
    # 1217 TFLOP/s, before 1076 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (1664, 1408, 2048): block_scaled.Tiles(band=16, pair=False),
    # 1178 TFLOP/s, before 1101 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (1664, 2048, 1408): block_scaled.Tiles(store_columns=64, band=16),
    # 1339 TFLOP/s, before 1316 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (4096, 4096, 7168): block_scaled.Tiles(),
    # 1266 TFLOP/s, before 1230 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (4096, 7168, 2048): block_scaled.Tiles(store_columns=64, band=16),
    # 1311 TFLOP/s, before 1294 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (4096, 7168, 4096): block_scaled.Tiles(),
}

# (rows a group, N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tile_scaled.Tiles] = {
    # 646 TFLOP/s, before 621 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (1024, 4096, 7168): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24, fetch_sums=True
    ),
    # 664 TFLOP/s, before 631 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (1024, 7168, 2048): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24, fetch_sums=True
    ),
    # 799 TFLOP/s, before 779 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (1664, 1408, 2048): tile_scaled.Tiles(
        warpgroups=3, stages=3, store_columns=128, store_buffers=1, band=16,
        memory_registers=24, fetch_sums=True
    ),
    # 807 TFLOP/s, before 800 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (1664, 2048, 1408): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24
    ),
    # 840 TFLOP/s, before 813 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (4096, 4096, 7168): tile_scaled.Tiles(columns=160, stages=4, store_buffers=1),
    # 860 TFLOP/s, before 836 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (4096, 7168, 2048): tile_scaled.Tiles(
        warpgroups=3, stages=3, store_columns=128, store_buffers=1, band=16, memory_registers=24
    ),
}
