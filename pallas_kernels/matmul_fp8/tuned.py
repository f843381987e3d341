"""Tiles of dense FP8 products for the shapes of V3, as found on one NVIDIA H200.

Written by `bench tune gemm`; a shape that is not here follows the rules in hopper.py.
"""

from pallas_kernels import block_scaled, tile_scaled

# (N, K), for more than 128 rows.
TILES: dict[tuple[int, ...], block_scaled.Tiles] = {
    # 1334 TFLOP/s, before 1018 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (512, 32768): block_scaled.Tiles(
        warpgroups=2, stages=6, band=16, memory_registers=40, in_flight=2, round=8
    ),
    # 1330 TFLOP/s, before 1278 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (2048, 7168): block_scaled.Tiles(
        warpgroups=2, stages=6, band=16, memory_registers=40, in_flight=2, round=8
    ),
    (2112, 7168): block_scaled.Tiles(band=16),
    # 1266 TFLOP/s, before 1259 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (7168, 2048): block_scaled.Tiles(band=4),
    # 1233 TFLOP/s, before 1217 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (7168, 2176): block_scaled.Tiles(band=4),
    # 1332 TFLOP/s, before 1324 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (7168, 4096): block_scaled.Tiles(band=4),
    # 1337 TFLOP/s, before 1301 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (7168, 16384): block_scaled.Tiles(),
    # 1410 TFLOP/s, before 1386 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (8192, 8192): block_scaled.Tiles(),
    # 1310 TFLOP/s, before 1300 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (24576, 1536): block_scaled.Tiles(store_columns=64),
    # 1065 TFLOP/s, before 1044 TFLOP/s; NVIDIA H200, 2026-11-30, commit 7a23802.
    (32768, 512): block_scaled.Tiles(store_columns=64),
}

# (rows, N, K), for 64 rows and for 128.
FEW: dict[tuple[int, ...], block_scaled.Tiles] = {
    # 177 TFLOP/s, before 170 TFLOP/s; NVIDIA H200, 2026-12-01, commit 6063948.
    (64, 2112, 7168): block_scaled.Tiles(
        warpgroups=1, columns=32, stages=12, store_buffers=1, pair=False, memory_registers=40,
        in_flight=3
    ),
    # 588 TFLOP/s with one in flight, cuBLASLt 535.
    (128, 24576, 1536): block_scaled.Tiles(2, 64, 8, pair=False, memory_registers=40, in_flight=2),
}

# (N, K) of weight gradients.
GRADIENT_TILES: dict[tuple[int, ...], tile_scaled.Tiles] = {
    # 856 TFLOP/s, before 810 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (2112, 7168): tile_scaled.Tiles(columns=160, stages=4, store_buffers=1),
    # 858 TFLOP/s, before 826 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (4096, 7168): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24
    ),
    # 826 TFLOP/s, before 796 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (7168, 2048): tile_scaled.Tiles(columns=160, stages=4, store_buffers=1),
    # 841 TFLOP/s, before 829 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (7168, 16384): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24
    ),
    # 901 TFLOP/s, before 860 TFLOP/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (24576, 1536): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24
    ),
    # 777 TFLOP/s, before 740 TFLOP/s; NVIDIA H200, 2026-11-30, commit 5ea3c52.
    (32768, 512): tile_scaled.Tiles(
        warpgroups=3, columns=96, stages=4, store_columns=96, store_buffers=1, band=16,
        memory_registers=24
    ),
}
