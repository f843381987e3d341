"""What the products on Hopper share: how the pieces of a tile are stored."""

import pytest

from pallas_kernels import block_scaled, grouped_matmul, pipeline, tile_scaled


@pytest.mark.parametrize(
    "tiles", [block_scaled.Tiles(), tile_scaled.Tiles(columns=96, store_buffers=3)], ids=["y", "dw"]
)
def test_no_piece_of_a_tile_is_as_wide_as_a_result_that_ends_inside_it(tiles):
    # Mosaic ignores where such a piece lies: those past the end were written over the result.
    reach = pipeline.pair_width(tiles)
    assert pipeline.narrow(tiles, 32, reach).store_columns == 16
    assert all(pipeline.narrow(tiles, columns, reach) is tiles for columns in (16, 48, 64, 4096))


def test_a_result_of_one_piece_is_stored_in_one():
    tiles = block_scaled.Tiles(columns=32, store_buffers=1, pair=False)
    assert pipeline.narrow(tiles, 32, 32) is tiles
    # Of two blocks one below the other as well.
    tiles = grouped_matmul.tiles.Tiles(columns=64, store_buffers=1)
    assert pipeline.narrow(tiles, 64, tiles.columns) is tiles
