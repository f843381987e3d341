"""`bench grouped`: the experts' products, FP8 and BF16, beside torch's grouped ones."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernel_data import BF16, F8, F32, tile_specs, weight_specs
from experiments.bench.kernel_report import geometric_mean, verdict
from experiments.bench.kernel_run import Case, KernelArgs, Program, bench, cores, ratios
from pallas_kernels.grouped_matmul import group_starts, padded_sizes
from pallas_kernels.grouped_matmul import hopper as bf16
from pallas_kernels.grouped_matmul_fp8 import hopper as fp8

ROWS = 32_768
# (N, K): gate and up side by side, down, and the input gradients of both.
SHAPES = [(4096, 7168), (7168, 2048), (7168, 4096), (2048, 7168)]
WEIGHTS = SHAPES[:2]
GROUPS = (8, 32)
PRECISE, FAST, PLAIN = "torch FP8, precise", "torch FP8, fast", "torch BF16"
PEERS = True
spec = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class BenchGroupedArgs(KernelArgs):
    """Time the experts' products of 32,768 rows in 8 and 32 groups beside torch's, in one run.

    By rows (forward, input gradient) and by contraction (weight gradient, with and without an FP32
    accumulator), in FP8 and in BF16; and by rows with skewed groups: one of 8 times the mean, some
    empty. Peers: torch's `_scaled_grouped_mm` (a scale a row; precise and fast accumulation) and
    `_grouped_mm` in BF16. Clock and order as in `bench gemm`.
    """


def bench_grouped(args: BenchGroupedArgs) -> None:
    """Checks, times and judges; one to two minutes on an H200 with 16 cores."""
    bench(args, "grouped")


def cases() -> list[Case]:
    found = [fp8_rows(equal(g), n, k, "FP8 by rows") for g in GROUPS for n, k in SHAPES]
    found += [fp8_rows(skewed(g), n, k, "FP8, skewed") for g in GROUPS for n, k in WEIGHTS]
    found += [fp8_contraction(equal(g), n, k) for g in GROUPS for n, k in WEIGHTS]
    found += [bf16_rows(equal(g), n, k) for g in GROUPS for n, k in SHAPES]
    return found + [bf16_contraction(equal(g), n, k) for g in GROUPS for n, k in WEIGHTS]


def equal(groups: int) -> np.ndarray:
    return np.full(groups, ROWS // groups, np.int32)


def skewed(groups: int) -> np.ndarray:
    """A group of 8 times the mean (of 8: all but 512 rows), some empty, the rest even."""
    sizes = np.zeros(groups, np.int32)
    sizes[1] = min(8 * ROWS // groups, ROWS - 512)
    rest = ROWS - int(sizes[1])
    others = [g for g in range(groups) if g != 1 and g % 4][: rest // 128]
    sizes[others] = rest // len(others) // 128 * 128
    return sizes


def places(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and padded sizes of the groups."""
    return tuple(np.asarray(of(sizes, 128), np.int32) for of in (group_starts, padded_sizes))


def ends(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes, dtype=np.int32)


def shape_name(sizes: np.ndarray, n: int, k: int) -> str:
    return f"{len(sizes)} groups, {n} x {k}"


def fp8_rows(sizes: np.ndarray, n: int, k: int, section: str, buffer: int = ROWS) -> Case:
    groups, rows = len(sizes), int(sizes.sum())
    call = functools.partial(
        fp8.by_rows,
        tiles=fp8.tiles_of(buffer, groups, n, k),
        cores=cores(),
        out_dtype=jnp.dtype(BF16),
    )
    operands = (*tile_specs(buffer, k), *weight_specs(n, k, groups), *places(sizes))
    peers = {}
    if section == "FP8 by rows":
        codes = (spec((ROWS, k), F8), spec((groups, n, k), F8))
        scales = (spec((ROWS,), F32), spec((groups, n), F32))
        for name, fast in ((PRECISE, False), (FAST, True)):
            prepare = functools.partial(row_scaled, fast=fast)
            peers[name] = (prepare, (*codes, *scales, ends(sizes)))
    used = int((sizes > 0).sum())
    moved = rows * k + used * n * k + 2 * rows * n
    name = shape_name(sizes, n, k)
    return Case(section, name, 2.0 * rows * n * k, moved, {"ours": Program(call, operands)}, peers)


def fp8_contraction(sizes: np.ndarray, n: int, k: int, buffer: int = ROWS) -> Case:
    groups, rows = len(sizes), int(sizes.sum())
    tiles = fp8.gradient_tiles_of(buffer, groups, n, k)
    call = functools.partial(fp8.by_contraction, tiles=tiles, cores=cores())
    operands = (*tile_specs(n, buffer), *tile_specs(k, buffer), *places(sizes))
    total = spec((groups, n, k), F32)
    programs = {
        "ours, accumulating": Program(call, (*operands, total), carried=True),
        "ours": Program(lambda *operands, **options: call(*operands, None, **options), operands),
    }
    name, moved = shape_name(sizes, n, k), rows * (n + k) + 8 * groups * n * k
    peers = {PLAIN: (contraction, bf16_operands(n, k, sizes))}
    return Case("FP8 weight gradient", name, 2.0 * rows * n * k, moved, programs, peers)


def bf16_rows(sizes: np.ndarray, n: int, k: int) -> Case:
    """Forward shapes with [G, N, K], input gradients with the same weight from its other side."""
    groups, last = len(sizes), (n, k) in WEIGHTS
    call = functools.partial(
        bf16.by_rows,
        alignment=128,
        contract_last=last,
        tiles=bf16.tiles_by_rows(ROWS, groups, n, k),
        cores=cores(),
    )
    x, w = spec((ROWS, k), BF16), spec((groups, n, k) if last else (groups, k, n), BF16)
    programs = {"ours": Program(call, (x, w, sizes))}
    prepare = functools.partial(by_rows, last=last)
    moved = 2 * (ROWS * k + groups * n * k + ROWS * n)
    name, peers = shape_name(sizes, n, k), {PLAIN: (prepare, (x, w, ends(sizes)))}
    return Case("BF16 by rows", name, 2.0 * ROWS * n * k, moved, programs, peers)


def bf16_contraction(sizes: np.ndarray, n: int, k: int) -> Case:
    groups = len(sizes)
    call = lambda dtype: functools.partial(
        bf16.by_contraction,
        alignment=128,
        tiles=bf16.tiles_by_contraction(ROWS, groups, n, k),
        cores=cores(),
        out_dtype=jnp.dtype(dtype),
    )
    operands = (spec((ROWS, n), BF16), spec((ROWS, k), BF16), sizes)
    programs = {
        # As torch's: BF16 out.
        "ours": Program(call(BF16), operands),
        "ours, FP32 out": Program(call(F32), operands),
    }
    name, moved = shape_name(sizes, n, k), 2 * ROWS * (n + k) + 2 * groups * n * k
    peers = {PLAIN: (contraction, bf16_operands(n, k, sizes))}
    return Case("BF16 weight gradient", name, 2.0 * ROWS * n * k, moved, programs, peers)


def bf16_operands(n: int, k: int, sizes: np.ndarray):
    return spec((ROWS, n), BF16), spec((ROWS, k), BF16), ends(sizes)


def row_scaled(torch, a, b, a_scale, b_scale, ends, *, fast):
    return lambda: torch._scaled_grouped_mm(
        a, b.transpose(1, 2), a_scale, b_scale, ends, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def by_rows(torch, x, w, ends, *, last):
    return lambda: torch._grouped_mm(x, w.transpose(1, 2) if last else w, ends)


def contraction(torch, y, x, ends):
    return lambda: torch._grouped_mm(y.t(), x, ends)


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars of grouped products, as far as their peers were timed."""
    verdicts = []
    precise = ratios(rows, "FP8 by rows", PRECISE)
    if precise:
        mean = geometric_mean(precise.values())
        verdicts.append(verdict("FP8 by rows over torch precise, geometric mean", mean, 1.25))
    rate = lambda section: {
        row["shape"]: row["TFLOP/s"]
        for row in rows
        if row["section"] == section and row["kernel"] == "ours"
    }
    even, skew = rate("FP8 by rows"), rate("FP8, skewed")
    kept = [skew[shape] / even[shape] for shape in skew if shape in even]
    if kept:
        verdicts.append(verdict("skewed over equal groups, least", min(kept), 0.9))
    weights = ratios(rows, "FP8 weight gradient", PLAIN)
    for groups, limit in zip(GROUPS, (1.3, 1.0), strict=True):
        found = [r for shape, r in weights.items() if shape.startswith(f"{groups} ")]
        if found:
            bar = f"FP8 weight gradient, accumulating, {groups} groups over torch BF16"
            verdicts.append(verdict(bar, geometric_mean(found), limit))
    plain = [
        ratio
        for section in ("BF16 by rows", "BF16 weight gradient")
        for ratio in ratios(rows, section, PLAIN).values()
    ]
    if plain:
        verdicts.append(verdict("BF16 over torch, geometric mean", geometric_mean(plain), 1.0))
        verdicts.append(verdict("BF16 over torch, least", min(plain), 0.95))
    return verdicts
