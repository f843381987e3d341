"""`bench quantize`: quantisation and its fused forms beside a copy of as many bytes."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.kernel_data import BF16, F8, F32
from experiments.bench.kernel_report import geometric_mean, verdict
from experiments.bench.kernel_run import Case, KernelArgs, Program, bench, cores, ratios
from pallas_kernels.quantize_fp8 import blocks, hopper, swiglu_gradient
from pallas_kernels.quantize_fp8.hopper import Form

SIZES = [(m, k) for m in (16384, 4096) for k in (7168, 2048, 18432)]
# Form, and the bytes of a value that it reads and writes.
FORMS = {
    "rows": (Form(), 3),
    "RMSNorm": (Form(by_row=True, by_column=True), 3),
    "SwiGLU": (Form(inputs=2, by_row=True), 5),
    "SwiGLU, inputs kept": (Form(inputs=2, by_row=True, keep=True), 7),
    "both layouts": (Form(columns=True), 4),
    "SwiGLU, both layouts": (Form(inputs=2, by_row=True, columns=True), 6),
    "re-tiling": (Form(codes=True, rows=False, columns=True), 2),
}
COPY = "copy"
PEERS = False
spec = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class BenchQuantizeArgs(KernelArgs):
    """Time quantisation to FP8 and its fused forms beside a copy of the bytes that they must move.

    At 4096 and 16384 rows of 2048, 7168 and 18432: tiles by rows; with RMSNorm (its row sums
    given); with SwiGLU and routing weights, alone and with its inputs kept; both layouts in one
    pass; re-tiling for the weight gradient; SwiGLU backward; and weights in blocks of 128 x 128
    with their transpose. There is no peer but the copy.
    """


def bench_quantize(args: BenchQuantizeArgs) -> None:
    """Checks, times and judges; one to two minutes on an H200 with 16 cores."""
    bench(args, "quantize")


def cases() -> list[Case]:
    found = [activations(name, m, k) for m, k in SIZES for name in FORMS]
    found += [backward(m, k) for m, k in SIZES]
    return found + [weights(k, k, dtype) for k in (2048, 7168) for dtype in (F32, BF16)]


def activations(name: str, m: int, k: int) -> Case:
    form, width = FORMS[name]
    scales = 4 * m * k // 128 * (form.rows + form.columns + form.codes + 2 * form.keep)
    program = with_tiles(name, m, k, hopper.tiles_of(form))
    return case(name, f"{m} x {k}", program, m * k * width + scales)


def with_tiles(name: str, m: int, k: int, tiles: hopper.Tiles) -> Program:
    """A form of quantisation in blocks, stages and warpgroups."""
    form, _ = FORMS[name]
    inputs = (spec((m, k), F8 if form.codes else BF16),) * form.inputs
    factors = []
    if form.by_row or form.codes:
        factors.append(spec((k // 128, m) if form.codes else (m,), F32))
    if form.by_column:
        factors.append(spec((k,), F32))
    call = functools.partial(
        hopper.quantize, form=form, tiles=tiles, cores=cores(), name="quantize_fp8"
    )

    def run(*operands):
        return call(operands[: form.inputs], *operands[form.inputs :])

    return Program(run, (*inputs, *factors))


def backward(m: int, k: int) -> Case:
    """SwiGLU backward: 4 bytes of a value in, 5 out."""
    tiles = (spec((m, k), F8), spec((k // 128, m), F32))
    call = functools.partial(
        swiglu_gradient.swiglu_gradient, counts_m=None, power_of_two=False, cores=cores()
    )

    def run(gate, gate_scale, up, up_scale, dy, weight):
        return call((gate, gate_scale), (up, up_scale), dy, weight)

    program = Program(run, (*tiles, *tiles, spec((m, k), BF16), spec((m,), F32)))
    return case("SwiGLU backward", f"{m} x {k}", program, m * k * 9 + 4 * m * k // 128 * 8)


def weights(n: int, k: int, dtype: Any) -> Case:
    call = functools.partial(
        blocks.quantize_blocks,
        power_of_two=False,
        per_core=blocks.blocks_of(dtype),
        cores=cores(),
    )
    width = jnp.dtype(dtype).itemsize + 2
    shape = f"{n} x {k} {jnp.dtype(dtype).name}"
    return case("blocks", shape, Program(call, (spec((1, n, k), dtype),)), n * k * width)


def case(section: str, shape: str, program: Program, moved: int) -> Case:
    """A pass beside a copy that reads and writes as many bytes."""
    copied = Program(lambda x: x + jnp.float32(1), (spec((moved // 8,), F32),))
    return Case(section, shape, 0.0, moved, {"ours": program, COPY: copied})


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At least 0.8 of the bandwidth of the copy: the mean of each form, and the least of all."""
    verdicts, every = [], []
    for section in dict.fromkeys(row["section"] for row in rows):
        found = list(ratios(rows, section, COPY).values())
        bar = f"{section}: bandwidth over a copy's, geometric mean"
        verdicts.append(verdict(bar, geometric_mean(found), 0.8))
        every += found
    if every:
        verdicts.append(verdict("bandwidth over a copy's, least", min(every), 0.8))
    return verdicts
