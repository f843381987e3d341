"""The shapes whose tiles are tuned, the variants of each, and the program that is timed."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.bench import gemm, grouped, quantize
from experiments.bench.kernel_data import up
from experiments.bench.kernel_run import Case, Program, cores
from pallas_kernels import block_scaled, tile_scaled
from pallas_kernels.grouped_matmul import hopper as grouped_bf16
from pallas_kernels.grouped_matmul import tiles as bf16_tiles
from pallas_kernels.grouped_matmul_fp8 import hopper as grouped_fp8
from pallas_kernels.matmul_fp8 import hopper as dense_fp8
from pallas_kernels.quantize_fp8 import hopper as quantize_fp8
from pallas_kernels.quantize_fp8 import tiles as quantize_tiles

Tiles = Any


@dataclass(frozen=True)
class Choice:
    """Variants of the tiles of one shape, the present one first, and the entry they are for."""

    op: str
    table: str
    key: tuple[int, ...]
    variants: Mapping[str, Tiles]
    program: Callable[[Tiles], Program]
    flops: float
    bytes: float

    @property
    def name(self) -> str:
        return f"{self.op}.{self.table}{self.key}"


def variants(present: Tiles, **others: Tiles) -> dict[str, Tiles]:
    """The present tiles, and those that differ from it."""
    return {"present": present} | {n: t for n, t in others.items() if t != present}


def of_case(case: Case, **found: Any) -> Choice:
    return Choice(flops=case.flops, bytes=case.bytes, **found)


def dense() -> Iterator[Choice]:
    big = [(4096, n, k) for n, k in gemm.V3] + [(gemm.CUBE,) * 3]
    big += [(4096, k, n) for n, k in gemm.V3]
    for m, n, k in big:
        make = block_scaled.Tiles
        plain = {f"band{b}": make(band=b) for b in (4, 8, 16)}
        plain["wide"] = make(store_columns=64, store_buffers=2)
        plain |= two_in_flight()
        # Row tiles are for a rule to choose, not for the table.
        present = dataclasses.replace(dense_fp8.tiles_of(m, n, up(k, 128), cores()), row_tiles=0)
        yield dense_choice("TILES", (n, up(k, 128)), m, n, k, variants(present, **plain))


def two_in_flight() -> dict[str, Tiles]:
    """Two warpgroups have the registers for a second product each."""
    two = functools.partial(block_scaled.Tiles, 2, 128, 6, memory_registers=40, in_flight=2)
    return {f"two.r{steps}": two(round=steps, band=16) for steps in (2, 8)}


def few_rows() -> Iterator[Choice]:
    for m in (64, 128):
        for n, k in gemm.V3:
            make = functools.partial(block_scaled.Tiles, 1 if m == 64 else 2, memory_registers=40)
            stages = {32: 12, 64: 10, 128: 7} if m == 64 else {32: 9, 64: 8, 128: 6}
            few = {
                f"c{c}.f{f}": make(c, stages[c], 32, c // 32, pair=False, in_flight=f)
                for c in (32, 64)
                for f in (1, 2, 3)
            }
            few["c128.f2"] = make(128, stages[128], pair=False, in_flight=2)
            few["c64.f2.pair"] = make(64, stages[64], in_flight=2)
            present = dense_fp8.tiles_of(m, n, k, cores())
            yield dense_choice("FEW", (m, n, k), m, n, k, variants(present, **few))


def dense_gradients() -> Iterator[Choice]:
    for n, k in gemm.V3:
        case = gemm.weight_gradient(4096, n, k)
        yield of_case(
            case,
            op="matmul_fp8",
            table="GRADIENT_TILES",
            key=(n, k),
            variants=variants(dense_fp8.gradient_tiles_of(n, k), **gradients()),
            program=functools.partial(retiled, case.programs["ours, accumulating"]),
        )


def with_rows(tiles: Tiles, m: int, n: int, k: int) -> Tiles:
    row_tiles = dense_fp8.balanced_row_tiles(m, n, up(k, 128), tiles, cores())
    return dataclasses.replace(tiles, row_tiles=row_tiles)


def dense_choice(table, key, m, n, k, found) -> Choice:
    case = gemm.product("", m, n, k)

    def program(tiles):
        if table == "TILES":
            tiles = with_rows(tiles, m, n, k)
        return retiled(case.programs["ours"], tiles)

    return of_case(case, op="matmul_fp8", table=table, key=key, variants=found, program=program)


def gradients() -> dict[str, Tiles]:
    three = functools.partial(tile_scaled.Tiles, 3, memory_registers=24, band=16)
    return {
        "3x96": three(96, 4, 96, 1),
        "3x96.fetch": three(96, 4, 96, 1, fetch_sums=True),
        "3x128": three(128, 4, 32, 2),
        "3x128.band8": three(128, 4, 32, 2, band=8),
        "3x128.halves": three(128, 4, 64, 1, band=8),
        # A whole tile in store buffers.
        "3x128.whole": three(128, 3, 128, 1),
        "3x128.fetch": three(128, 3, 128, 1, fetch_sums=True),
        # Fewer reads of shared memory for a product, and less beside one for the sums to hide.
        "2x160": tile_scaled.Tiles(2, 160, 4, 32, 1, band=8),
        "2x192": tile_scaled.Tiles(2, 192, 4, 32, 2, band=8),
        "2x192.halves": tile_scaled.Tiles(2, 192, 4, 64, 1, band=8),
        # As many rows a warpgroup as two have, for column scales that are read half as often.
        "2x96.slices": tile_scaled.Tiles(2, 96, 4, 48, 1, band=16, slices=2),
        "2x128.slices": tile_scaled.Tiles(2, 128, 4, 32, 1, slices=2),
    }


def retiled(program: Program, tiles: Tiles) -> Program:
    """The same program with other tiles: its launcher is a partial, or a function of one."""
    function = program.function
    if isinstance(function, functools.partial):
        changed = functools.partial(function.func, **{**function.keywords, "tiles": tiles})
    else:
        changed = functools.partial(function, tiles=tiles)
    return dataclasses.replace(program, function=changed)


def expert_shapes(v3: Iterable[tuple[int, int]]) -> Iterator[tuple]:
    """Sizes, N, K and the rows of the buffers: those of the peer-sized model, and V3's."""
    # 64 experts of 1408 on 16,384 tokens, 6 experts each, and room for their padding.
    peer = np.full(64, 1536, np.int32)
    for n, k in ((1408, 2048), (2048, 1408)):
        yield peer, n, k, 64 * (1536 + 128)
    for groups in grouped.GROUPS:
        for n, k in v3:
            yield grouped.equal(groups), n, k, grouped.ROWS


def expert_gradients() -> Iterator[Choice]:
    for sizes, n, k, buffer in expert_shapes(grouped.WEIGHTS):
        groups = len(sizes)
        present = grouped_fp8.gradient_tiles_of(buffer, groups, n, k)
        case = grouped.fp8_contraction(sizes, n, k, buffer)
        # The peer's step has one micro-batch and adds nothing.
        program = case.programs["ours, accumulating" if buffer == grouped.ROWS else "ours"]
        yield of_case(
            case,
            op="grouped_matmul_fp8",
            table="GRADIENT_TILES",
            key=(buffer // groups, n, k),
            variants=variants(present, **gradients()),
            program=functools.partial(retiled, program),
        )


def experts() -> Iterator[Choice]:
    for sizes, n, k, buffer in expert_shapes(grouped.SHAPES):
        groups = len(sizes)
        make, present = block_scaled.Tiles, grouped_fp8.tiles_of(buffer, groups, n, k)
        found = {f"band{band}": make(band=band) for band in (8, 16, 32)}
        found["wide"] = make(band=16, store_columns=64, store_buffers=2)
        found |= two_in_flight()
        if -(-n // 128) % 2:
            # In pairs the last column tile has an empty one beside it.
            found["single"] = make(band=16, pair=False)
        case = grouped.fp8_rows(sizes, n, k, "", buffer)
        yield grouped_choice(
            case,
            "grouped_matmul_fp8",
            "TILES",
            (buffer // groups, n, k),
            variants(present, **found),
        )


def experts_bf16() -> Iterator[Choice]:
    make = bf16_tiles.Tiles
    for groups in grouped.GROUPS:
        sizes, each = grouped.equal(groups), grouped.ROWS // groups
        for n, k in grouped.SHAPES:
            present = grouped_bf16.tiles_by_rows(grouped.ROWS, groups, n, k)
            found = {"single": make(pair=False), "pair": make(), "band8": make(band=8, pair=False)}
            # A whole tile in store buffers.
            found["whole"] = make(256, 3, 64, 4, pair=False)
            found["whole.pair"] = make(256, 3, 64, 4)
            case = grouped.bf16_rows(sizes, n, k)
            yield grouped_choice(
                case, "grouped_matmul", "TILES", (each, n, k), variants(present, **found)
            )
        for n, k in grouped.WEIGHTS:
            present = grouped_bf16.tiles_by_contraction(grouped.ROWS, groups, n, k)
            found = {"s4": make(256, 4, 32, 2, pair=False), "s3": make(256, 3, 32, 4)}
            found |= {"s4.pair": make(256, 4, 32, 2), "wide": make(256, 4, 64, 1, pair=False)}
            case = grouped.bf16_contraction(sizes, n, k)
            yield grouped_choice(
                case, "grouped_matmul", "GRADIENT_TILES", (each, n, k), variants(present, **found)
            )


def grouped_choice(case, op, table, key, found) -> Choice:
    program = functools.partial(retiled, next(iter(case.programs.values())))
    return of_case(case, op=op, table=table, key=key, variants=found, program=program)


def quantising() -> Iterator[Choice]:
    make = quantize_tiles.Tiles
    for name, (form, _) in quantize.FORMS.items():
        case = quantize.activations(name, 16384, 7168)
        if form.columns:
            found = {f"{b}.{s}.{w}": make(b, s, w) for b, s, w in ((2, 2, 2), (2, 1, 2), (1, 2, 2))}
            found |= {"2.2.1": make(2, 2), "3.1.1": make(3, 1), "1.3.2": make(1, 3, 2)}
            # Warpgroups that share nothing: how many is all that counts, with two stages or three.
            found |= {"5.2": make(5, 2), "4.3": make(4, 3)} if form.codes else {}
        else:
            found = {f"{b}.{s}": make(b, s) for b, s in ((4, 2), (3, 2), (2, 2), (3, 3), (2, 3))}
            found |= {"4.1": make(4, 1), "3.1": make(3, 1)}
        found = {n: t for n, t in found.items() if fits(form, t)}
        present = quantize_fp8.tiles_of(form)
        program = functools.partial(quantize.with_tiles, name, 16384, 7168)
        yield of_case(
            case,
            op="quantize_fp8",
            table="TILES",
            key=form.key,
            variants=variants(present, **found),
            program=program,
        )


def fits(form: Any, tiles: Tiles) -> bool:
    """Whether so many blocks fit on an SM; one that does not would run after the others."""
    if form.codes:
        # A stage, its scales, the FP16 piece and its codes; scales of a slot more; the identity.
        each = tiles.stages * (8192 + 512) + 16384 + 8192 + 1024
        return tiles.blocks * tiles.warpgroups * each + 8192 <= 226 * 1024
    stage = form.inputs * form.height * 128 * 2
    sites = form.rows + form.columns + 2 * form.keep
    pieces = 8192 * sites * (tiles.stages if form.one_piece else form.height // 64)
    rest = 8192 * form.columns + 8192
    return tiles.blocks * (tiles.stages * stage + pieces + rest) <= 228 * 1024


def joined(*parts: Callable[[], Iterator[Choice]]) -> Callable[[], Iterator[Choice]]:
    return lambda: (choice for part in parts for choice in part())


CHOICES = {
    "gemm": joined(dense_gradients, dense, few_rows),
    "grouped": joined(expert_gradients, experts, experts_bf16),
    "quantize": quantising,
    "all": joined(
        expert_gradients, dense_gradients, experts, dense, experts_bf16, quantising, few_rows
    ),
}
