"""Blocks, stages and warpgroups of quantising kernels, as found on one NVIDIA H200.

Written by `bench tune quantize`; a form that is not here follows the rules in hopper.py.
"""

from pallas_kernels.quantize_fp8 import tiles

# Form.key.
TILES: dict[tuple[int, ...], tiles.Tiles] = {
    # 4045 GB/s, before 4021 GB/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (1, 0, 0, 1, 0, 0): tiles.Tiles(),
    # 3667 GB/s, before 3636 GB/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (1, 0, 0, 1, 1, 0): tiles.Tiles(blocks=1, stages=3, warpgroups=2),
    # 3956 GB/s, before 3895 GB/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (1, 0, 1, 1, 0, 0): tiles.Tiles(),
    # 3284 GB/s, before 3173 GB/s; NVIDIA H200, 2026-12-01, commit dcaad58.
    (1, 1, 0, 0, 1, 0): tiles.Tiles(warpgroups=2),
}
