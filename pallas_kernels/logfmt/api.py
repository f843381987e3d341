"""LogFMT-n (ISCA section 3.2): contracts, checks and the choice of implementation.

A tile is 128 neighbours of a row. Its magnitudes other than zero reach from `low` to `high`, the
first no less than high / 2^32, in steps of log2(high / low) / (2^(n-1) - 2) octaves:

    code 0 -> 0;   code K, from 1 to 2^(n-1) - 1 -> low * 2^(step (K - 1));   a sign bit above

and a value gets the code of the decoded value nearest to it, not of the nearest logarithm, so that
means are kept. Both extremes are rounded to BF16, which is exact for BF16 values, and codes 1 and
2^(n-1) - 1 decode to them. What is below the mean of `low` and one step less becomes 0. Values that
were decoded get the same codes again, unless code 1 stood for nothing because all below it was
beyond 2^32, or FP32 values were less than a BF16 place apart. A NaN or an infinity makes its whole
tile NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.logfmt import hopper, reference
from pallas_kernels.logfmt.reference import TILE

BITS = range(4, 11)


class LogFMT(NamedTuple):
    """Rows in n bits a value: every array has a row of its own for each, so they can be moved.

    words uint16 [M, 8 n k]: in a tile, value 8 i + c has bits n i to n i + n of string c, whose
    16-bit pieces are words c, 8 + c, 16 + c and so on. low and high bfloat16 [M, k].
    """

    words: Array
    low: Array
    high: Array


def encode_logfmt(
    x_MK: Float[Array, "M K"], n: int, *, implementation: str | None = None
) -> LogFMT:
    """Codes of n bits, 4 to 10; the last tile of a row is filled up with zeros."""
    _check_bits(n)
    if x_MK.ndim != 2 or x_MK.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x must be float32 or bfloat16 [M, K], not {x_MK.dtype} {x_MK.shape}")
    if mosaic.choose(implementation, "encode_logfmt") == "reference":
        words_MW, low_Mk, high_Mk = reference.encode(x_MK, n)
    else:
        if x_MK.shape[1] % 8:
            raise NotImplementedError(
                f"the kernel takes rows of a multiple of 8, not {x_MK.shape[1]}: pad them"
            )
        words_MW, low_Mk, high_Mk = hopper.encode(
            x_MK, n=n, tiles=hopper.tiles_of(x_MK.dtype), cores=mosaic.target().cores
        )
    return LogFMT(words_MW, low_Mk.astype(jnp.bfloat16), high_Mk.astype(jnp.bfloat16))


def decode_logfmt(
    x: LogFMT,
    n: int,
    width: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "M K"]:
    """Rows of `width` values, decoded in FP32 and rounded to `dtype`."""
    _check_bits(n)
    _check_codes(x, n, width)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{dtype=} must be float32 or bfloat16")
    if mosaic.choose(implementation, "decode_logfmt") == "reference":
        return reference.decode(*x, n)[:, :width].astype(dtype)
    if width % 8:
        raise NotImplementedError(f"the kernel makes rows of a multiple of 8, not {width}: pad")
    return hopper.decode(
        x.words, x.low, x.high, n=n, width=width, dtype=jnp.dtype(dtype),
        tiles=hopper.Tiles(), cores=mosaic.target().cores,
    )  # fmt: skip


def round_to_logfmt(x: Float[Array, "... K"], n: int) -> Float[Array, "... K"]:
    """What is decoded from the codes of x, in x's dtype: plain arithmetic, no kernel."""
    _check_bits(n)
    return reference.round_trip(x, n).astype(x.dtype)


def _check_bits(n):
    if n not in BITS:
        raise ValueError(f"LogFMT has {BITS[0]} to {BITS[-1]} bits, not {n=}")


def _check_codes(x, n, width):
    tiles = -(-width // TILE)
    rows = x.words.shape[0]
    if x.words.dtype != jnp.uint16 or x.words.shape != (rows, 8 * n * tiles):
        raise ValueError(
            f"words of {n=} bits and {width=} must be uint16 [{rows}, {8 * n * tiles}], not "
            f"{x.words.dtype} {x.words.shape}"
        )
    for name, array in (("low", x.low), ("high", x.high)):
        if array.shape != (rows, tiles) or array.dtype != jnp.bfloat16:
            raise ValueError(
                f"{name} must be bfloat16 [{rows}, {tiles}], not {array.dtype} {array.shape}"
            )
