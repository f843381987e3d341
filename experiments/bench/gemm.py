"""`bench gemm`: the dense FP8 products beside cuBLASLt's, and the bars that they are held to."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.kernel_data import BF16, F8, F32, tile_specs, up, weight_specs
from experiments.bench.kernel_report import geometric_mean, verdict
from experiments.bench.kernel_run import Case, KernelArgs, Program, bench, cores, ratios
from pallas_kernels.matmul_fp8 import hopper

# (N, K) of V3's dense products: latent and rotary keys with the query latent, the two query and
# key-value expansions, the output, and the dense feed-forward network's parts.
V3 = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
CUBE = 8192
# DeepGEMM 2.6.1 on another H200 where cuBLASLt reached 1147 TFLOP/s at 8192 cubed, November 2026.
CUBE_THERE = 1147
INPUT_GRADIENT = dict(zip(V3, (1036, 1294, 1121, 1228, 1162, 1117), strict=True))
WEIGHT_GRADIENT = dict(zip(V3, (754, 846, 702, 887, 808, 788), strict=True))
BLOCK, TENSOR = "cuBLASLt block-scaled", "cuBLASLt per tensor, fast"
PEERS = True
spec = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class BenchGemmArgs(KernelArgs):
    """Time the block-scaled FP8 products on V3's shapes beside the vendor's, in one run.

    Forward and input gradient: 1 x 128 tiles times 128 x 128 blocks, BF16 out. Weight gradient:
    1 x 128 on both sides, added to an FP32 accumulator. Every time is the median of 30 calls, all
    kernels of a call added up, the L2 cache flushed before each; variants take turns. Peers:
    torch's `_scaled_mm` with the same scales (cuBLASLt), the same per tensor with fast accumulation
    (the ceiling), and JAX in BF16.
    """


def bench_gemm(args: BenchGemmArgs) -> None:
    """Checks, times and judges; one to two minutes on an H200 with 16 cores."""
    bench(args, "gemm")


def cases() -> list[Case]:
    """The shapes: M = 4096 with 8192 cubed, the gradients, and few rows."""
    large = [(4096, n, k) for n, k in V3] + [(CUBE, CUBE, CUBE)]
    products = [product("forward", *shape, bf16=True) for shape in large]
    products += [product("input gradient", 4096, k, n) for n, k in V3]
    products += [weight_gradient(4096, n, k) for n, k in V3]
    return products + [product(f"M = {m}", m, n, k) for m in (64, 128) for n, k in V3]


def product(section: str, m: int, n: int, k: int, *, bf16: bool = False) -> Case:
    tiles = hopper.tiles_of(m, n, up(k, 128), cores())
    call = functools.partial(hopper.matmul, tiles=tiles, cores=cores(), out_dtype=jnp.dtype(BF16))
    programs = {"ours": Program(call, (*tile_specs(m, k), *weight_specs(n, k)))}
    fewest = -(-m // tiles.rows)
    if bf16 and tiles.row_tiles != fewest:
        # What balancing the row tiles over the blocks brings.
        other = dataclasses.replace(tiles, row_tiles=fewest)
        other = functools.partial(call, tiles=other)
        programs["ours, fewest row tiles"] = Program(other, programs["ours"].operands)
    if bf16:
        dot = lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))
        programs["JAX BF16"] = Program(dot, (spec((m, k), BF16), spec((n, k), BF16)))
    peers = {}
    # cuBLASLt wants whole blocks along the contraction.
    if k % 128 == 0:
        codes = (spec((m, k), F8), spec((n, k), F8))
        wide = (spec((k // 128, m), F32), spec((up(n, 128) // 128, up(k // 128, 4)), F32))
        peers[BLOCK] = (block_scaled, (*codes, *wide))
        if bf16:
            peers[TENSOR] = (per_tensor, codes)
    moved = m * k + n * k + 2 * m * n
    return Case(section, f"{m} x {n} x {k}", 2.0 * m * n * k, moved, programs, peers)


def weight_gradient(tokens: int, n: int, k: int) -> Case:
    call = functools.partial(
        hopper.weight_gradient, tiles=hopper.gradient_tiles_of(n, k), cores=cores()
    )
    operands = (*tile_specs(n, tokens), *tile_specs(k, tokens))
    programs = {
        "ours, accumulating": Program(call, (*operands, spec((n, k), F32)), carried=True),
        "ours": Program(lambda *operands, **options: call(*operands, None, **options), operands),
    }
    moved = tokens * (n + k) + 8 * n * k
    return Case("weight gradient", f"{n} x {k} of {tokens}", 2.0 * tokens * n * k, moved, programs)


def block_scaled(torch, a, b, a_scale, b_scale):
    """cuBLASLt with tiles of 1 x 128 and blocks of 128 x 128."""
    scale = b_scale[:, : a.shape[1] // 128]
    return lambda: torch._scaled_mm(a, b.t(), a_scale.t(), scale.t(), out_dtype=torch.bfloat16)


def per_tensor(torch, a, b):
    """cuBLASLt with one scale a tensor, without promotion."""
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(
        a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars of dense products, as far as their peers were timed."""
    verdicts = []
    forward = ratios(rows, "forward", BLOCK)
    if forward:
        mean = geometric_mean(forward.values())
        verdicts.append(verdict("M = 4096 over cuBLASLt, geometric mean", mean, 1.15))
        verdicts.append(verdict("M = 4096 over cuBLASLt, least", min(forward.values()), 0.97))
    cube = f"{CUBE} x {CUBE} x {CUBE}"
    here = [row["TFLOP/s"] for row in rows if row["shape"] == cube and row["kernel"] == BLOCK]
    if here:
        for section, shape, there in (
            ("input gradient", "4096 x {k} x {n}", INPUT_GRADIENT),
            ("weight gradient", "{n} x {k} of 4096", WEIGHT_GRADIENT),
        ):
            found = tflops(rows, section)
            names = {shape.format(n=n, k=k): rate for (n, k), rate in there.items()}
            over = [found[name] * CUBE_THERE / here[0] / rate
                    for name, rate in names.items() if name in found]  # fmt: skip
            if over:
                bar = f"{section} over DeepGEMM there, geometric mean"
                verdicts.append(verdict(bar, geometric_mean(over), 0.97))
    for rows_of, limit in ((64, 1.25), (128, 1.0)):
        few = ratios(rows, f"M = {rows_of}", BLOCK)
        if few:
            bar = f"M = {rows_of} over cuBLASLt, geometric mean"
            verdicts.append(verdict(bar, geometric_mean(few.values()), limit))
    return verdicts


def tflops(rows: Sequence[Mapping[str, Any]], section: str) -> dict[str, float]:
    """TFLOP/s of the first of ours for each shape of a section."""
    found: dict[str, float] = {}
    for row in rows:
        if row["section"] == section and row["kernel"].startswith("ours"):
            found.setdefault(row["shape"], row["TFLOP/s"])
    return found
