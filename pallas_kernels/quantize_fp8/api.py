"""FP8 quantisation: contracts, checks and the choice of implementation.

The scale of a tile is amax / 448 in FP32 (or that rounded up to a power of two), amax floored at
1e-30, so a tile of zeros has codes of 0 and a finite scale. Codes saturate at +-448. A NaN or an
infinity in a tile makes its scale NaN: it reaches every product of the tile, and is never a finite
number. The contraction dimension of codes is padded with zeros to a multiple of 128.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import mosaic
from pallas_kernels.quantize_fp8 import blocks, hopper, reference, swiglu_gradient

F8 = reference.F8
TILE = reference.TILE
# Whose 128 neighbours share a scale: of a row, of a column, or both results.
By = Literal["rows", "columns", "both"]


class Tiles(NamedTuple):
    """An operand with one scale for 128 neighbours along the contraction.

    By rows: codes [M, 128 k] and scale [k, M]. By columns, for the weight gradient: codes
    [K, 128 m], transposed, and scale [m, K]. A scale's last dimension is a multiple of 4.
    """

    codes: Array
    scale: Array


class Blocks(NamedTuple):
    """A weight with one scale for 128 x 128, and the same codes transposed for input gradients.

    codes [..., N, 128 k], scale [..., n, k], transposed [..., K, 128 n] and its scale [..., k, n];
    the last dimension of a scale is a multiple of 32, of which what is added means nothing.
    """

    codes: Array
    scale: Array
    transposed: Array
    transposed_scale: Array


class SwigluGradient(NamedTuple):
    """What the backward pass of SwiGLU leaves: the operands of the five products that follow.

    The gradients of gate and up by rows (input gradients) and by columns (weight gradients), the
    product silu(gate) * up * weight by columns, and the gradient of the weight in FP32, or None.
    """

    gate: Tiles
    gate_columns: Tiles
    up: Tiles
    up_columns: Tiles
    product_columns: Tiles
    weight_M: Array | None


def quantize_tiles(
    x_MK: Float[Array, "M K"],
    *,
    by: By = "rows",
    power_of_two: bool = False,
    counts_m: Int32[Array, "m"] | None = None,
    implementation: str | None = None,
):
    """Tiles by rows, by columns, or the pair of both from one pass over x.

    Args:
      counts_m: rows of each 128 that hold data; the others are taken as 0, whatever they hold.
    """
    implementation = mosaic.choose(implementation, "quantize_fp8")
    _check(by, x_MK=x_MK)
    _check_counts(counts_m, x_MK)
    if implementation == "reference":
        return _by(reference.mask(x_MK, counts_m), by, power_of_two)
    return _launch((x_MK,), None, None, counts_m, by, power_of_two, "quantize_fp8")


def rms_norm_tiles(
    x_MK: Float[Array, "M K"],
    gain_K: Float[Array, "K"],
    *,
    epsilon: float,
    by: By = "rows",
    power_of_two: bool = False,
    implementation: str | None = None,
):
    """quantize_tiles of x / sqrt(mean(x^2) + epsilon) * gain, which is rounded to BF16 first."""
    implementation = mosaic.choose(implementation, "rms_norm_quantize_fp8")
    _check(by, x_MK=x_MK)
    if gain_K.shape != x_MK.shape[1:]:
        raise ValueError(f"{gain_K.shape=} must be {x_MK.shape[1:]}")
    if implementation == "reference":
        return _by(reference.rms_norm(x_MK, gain_K, epsilon), by, power_of_two)
    # XLA fuses this sum with the residual addition that makes x.
    mean_M = jnp.square(x_MK.astype(jnp.float32)).mean(axis=1)
    factor_M, gain_K = jax.lax.rsqrt(mean_M + epsilon), gain_K.astype(jnp.float32)
    return _launch((x_MK,), factor_M, gain_K, None, by, power_of_two, "rms_norm_quantize_fp8")


def swiglu_tiles(
    gate_MK: Float[Array, "M K"],
    up_MK: Float[Array, "M K"],
    weight_M: Float[Array, "M"] | None = None,
    *,
    by: By = "rows",
    power_of_two: bool = False,
    counts_m: Int32[Array, "m"] | None = None,
    keep: bool = False,
    implementation: str | None = None,
):
    """quantize_tiles of silu(gate) * up * weight, which is rounded to BF16 first.

    Args:
      keep: return (tiles, tiles of gate, tiles of up), all by rows, from one pass over both.
    """
    implementation = mosaic.choose(implementation, "swiglu_quantize_fp8")
    _check(by, gate_MK=gate_MK, up_MK=up_MK)
    _check_counts(counts_m, gate_MK)
    if keep and by != "rows":
        raise ValueError(f"gate and up are kept by='rows' only, not {by=}")
    if gate_MK.shape != up_MK.shape or gate_MK.dtype != up_MK.dtype:
        raise ValueError(
            f"gate and up differ: {gate_MK.shape} {gate_MK.dtype}, {up_MK.shape} {up_MK.dtype}"
        )
    if weight_M is not None and weight_M.shape != gate_MK.shape[:1]:
        raise ValueError(f"{weight_M.shape=} must be {gate_MK.shape[:1]}")
    if implementation == "reference":
        product_MK = reference.swiglu(gate_MK, up_MK, weight_M)
        found = _by(reference.mask(product_MK, counts_m), by, power_of_two)
        inputs = (reference.mask(x_MK, counts_m) for x_MK in (gate_MK, up_MK))
        return (found, *(_by(x_MK, by, power_of_two) for x_MK in inputs)) if keep else found
    weight_M = None if weight_M is None else weight_M.astype(jnp.float32)
    inputs = (gate_MK, up_MK)
    name = "swiglu_quantize_fp8"
    return _launch(inputs, weight_M, None, counts_m, by, power_of_two, name, keep)


def swiglu_gradient_tiles(
    gate: Tiles,
    up: Tiles,
    dy_MK: Float[Array, "M K"],
    weight_M: Float[Array, "M"] | None = None,
    *,
    power_of_two: bool = False,
    counts_m: Int32[Array, "m"] | None = None,
    implementation: str | None = None,
) -> SwigluGradient:
    """Backward of y = silu(gate) * up * weight from tiles by rows of gate and up, in one pass.

    The values of the tiles are taken in FP32; gradients and product are rounded to BF16 before they
    are quantised. `counts_m` as in quantize_tiles, for dy: gate and up were masked when quantised.
    """
    implementation = mosaic.choose(implementation, "swiglu_gradient_fp8")
    _check("both", dy_MK=dy_MK)
    _check_counts(counts_m, dy_MK)
    num_rows, width = dy_MK.shape
    for x in (gate, up):
        _check_tiles(x)
        if x.codes.shape != (num_rows, -(-width // TILE) * TILE):
            raise ValueError(f"codes of gate and up are {x.codes.shape}, dy is {dy_MK.shape}")
    if weight_M is not None and weight_M.shape != (num_rows,):
        raise ValueError(f"{weight_M.shape=} must be {(num_rows,)}")
    if implementation == "reference":
        dy_MK = reference.mask(dy_MK, counts_m)
        values = (reference.decode_tiles(*x)[:, :width] for x in (gate, up))
        dgate, dup, product, dweight_M = reference.swiglu_gradient(*values, dy_MK, weight_M)
        pairs = (_by(x_MK, "both", power_of_two) for x_MK in (dgate, dup))
        columns = _by(product, "columns", power_of_two)
        return SwigluGradient(*(x for pair in pairs for x in pair), columns, dweight_M)
    if dy_MK.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"the kernel takes bfloat16, not {dy_MK.dtype}: use implementation='reference'"
        )
    out = swiglu_gradient.swiglu_gradient(
        gate,
        up,
        dy_MK,
        weight_M,
        counts_m,
        power_of_two=power_of_two,
        cores=mosaic.target().cores,
    )
    dgate, dup, *columns = (Tiles(*out[i : i + 2]) for i in range(0, 10, 2))
    dweight_M = None if weight_M is None else out[10].sum(axis=0)[:num_rows]
    return SwigluGradient(dgate, columns[0], dup, columns[1], columns[2], dweight_M)


def retile(
    x: Tiles,
    width: int,
    *,
    power_of_two: bool = False,
    counts_m: Int32[Array, "m"] | None = None,
    implementation: str | None = None,
) -> Tiles:
    """Tiles by columns from tiles by rows, of `width` channels, for the weight gradient."""
    implementation = mosaic.choose(implementation, "retile_fp8")
    _check_tiles(x)
    _check_counts(counts_m, x.codes)
    if not 0 < width <= x.codes.shape[1]:
        raise ValueError(f"{width=} must be at most the {x.codes.shape[1]} of the codes")
    if implementation == "reference":
        x_MK = reference.decode_tiles(*x)[:, :width]
        return _by(reference.mask(x_MK, counts_m), "columns", power_of_two)
    form = hopper.Form(
        codes=True, rows=False, columns=True, masked=counts_m is not None, power_of_two=power_of_two
    )
    return Tiles(
        *hopper.quantize(
            (x.codes,),
            x.scale,
            None,
            counts_m,
            form=form,
            width=width,
            tiles=hopper.tiles_of(form),
            cores=mosaic.target().cores,
            name="retile_fp8",
        )
    )


def quantize_blocks(
    w: Float[Array, "*G N K"],
    *,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Blocks:
    """A weight [N, K], or one for each group [G, N, K], with its transpose."""
    implementation = mosaic.choose(implementation, "quantize_blocks_fp8")
    if w.ndim not in (2, 3):
        raise ValueError(f"a weight is [N, K] or [G, N, K], not {w.shape}")
    _check_dtype_and_widths("w", w, (w.shape[-2], w.shape[-1]))
    w_GNK = w[None] if w.ndim == 2 else w
    if implementation == "reference":
        turned_GKN = jnp.swapaxes(w_GNK, 1, 2)
        out = (
            *reference.blocks(w_GNK, power_of_two),
            *reference.blocks(turned_GKN, power_of_two),
        )
    else:
        out = blocks.quantize_blocks(
            w_GNK,
            power_of_two=power_of_two,
            per_core=blocks.blocks_of(w.dtype),
            cores=mosaic.target().cores,
        )
    return Blocks(*(array[0] if w.ndim == 2 else array for array in out))


def _by(x_MK, by, power_of_two):
    results = []
    if by != "columns":
        results.append(Tiles(*reference.tiles(x_MK, power_of_two)))
    if by != "rows":
        codes, scale = reference.tiles(x_MK.T, power_of_two)
        results.append(Tiles(codes, scale))
    return tuple(results) if by == "both" else results[0]


def _launch(x, row_M, column_K, counts_m, by, power_of_two, name, keep=False):
    if x[0].dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"the kernel takes bfloat16, not {x[0].dtype}: use implementation='reference'"
        )
    form = hopper.Form(
        inputs=len(x),
        by_row=row_M is not None,
        by_column=column_K is not None,
        masked=counts_m is not None,
        rows=by != "columns",
        columns=by != "rows",
        power_of_two=power_of_two,
        keep=keep,
    )
    out = hopper.quantize(
        x,
        row_M,
        column_K,
        counts_m,
        form=form,
        tiles=hopper.tiles_of(form),
        cores=mosaic.target().cores,
        name=name,
    )
    found = tuple(Tiles(*out[i : i + 2]) for i in range(0, len(out), 2))
    return found if len(found) > 1 else found[0]


def _check(by, **operands):
    if by not in ("rows", "columns", "both"):
        raise ValueError(f"{by=} must be 'rows', 'columns' or 'both'")
    for name, x_MK in operands.items():
        if x_MK.ndim != 2:
            raise ValueError(f"{name} must be [M, K], not {x_MK.shape}")
        _check_dtype_and_widths(name, x_MK, x_MK.shape[1:])


def _check_dtype_and_widths(name, x, widths):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{name} must be float32 or bfloat16, not {x.dtype}")
    for width in widths:
        if width % 16 or not width:
            raise ValueError(f"{name} is {x.shape}: pad its {width} to a multiple of 16")


def _check_tiles(x):
    tiles, rest = divmod(x.codes.shape[-1], TILE)
    rows = -(-x.codes.shape[0] // 4) * 4
    if x.codes.dtype != F8 or rest:
        raise ValueError(
            f"codes must be {jnp.dtype(F8).name} padded to a multiple of 128, not "
            f"{x.codes.dtype} {x.codes.shape}"
        )
    if x.scale.shape != (tiles, rows) or x.scale.dtype != jnp.float32:
        raise ValueError(
            f"scales of codes {x.codes.shape} must be float32 [{tiles}, {rows}], not "
            f"{x.scale.dtype} {x.scale.shape}"
        )


def _check_counts(counts_m, x_MK):
    if counts_m is None:
        return
    tiles = -(-x_MK.shape[0] // TILE)
    if counts_m.shape != (tiles,) or counts_m.dtype != jnp.int32:
        raise ValueError(
            f"counts of rows must be int32 [{tiles}], not {counts_m.dtype} {counts_m.shape}"
        )
