"""`bench gemm`, `grouped`, `quantize` without a GPU: their programs, bars, reports and errors."""

import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.bench import (
    gemm,
    grouped,
    kernel_checks,
    kernel_report,
    kernel_run,
    kernel_time,
    quantize,
)
from experiments.bench.kernel_data import F8, F32, random_array, weight_specs
from experiments.bench.kernel_run import FAMILIES
from pallas_kernels.quantize_fp8 import Tiles

MODULES = {family: importlib.import_module(f"experiments.bench.{family}") for family in FAMILIES}
CASES = [(family, case) for family, module in MODULES.items() for case in module.cases()]
FIRST = {(family, case.section): (family, case) for family, case in reversed(CASES)}


def lowered(case):
    for program in case.programs.values():
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.operands]
        traced = jax.jit(program.function).trace(*specs)
        assert traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("section", FIRST, ids="-".join)
def test_programs_of_every_section_lower_for_hopper(section):
    lowered(FIRST[section][1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_programs_lower_for_hopper(family):
    for case in MODULES[family].cases():
        lowered(case)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_checks_hold_for_the_reference(family):
    rows = list(getattr(kernel_checks, family)())
    assert len(rows) > 10 and [row for row in rows if not row["holds"]] == []


def test_a_check_of_bits_names_the_outputs_that_differ():
    def form(x, implementation=None):
        return Tiles(x, x if implementation == "reference" else x.at[1:].add(1))

    found = kernel_checks.same_bits("form", form, (jnp.zeros(4),), 0.1)
    bar = "form: share of other bits, scale 0.75"
    assert found == {"bar": bar, "found": 0.75, "limit": 0.1, "holds": False}


def row(section, shape, kernel, us, tflops=1000.0):
    return {"section": section, "shape": shape, "kernel": kernel, "us": us, "TFLOP/s": tflops}


def by_bar(verdicts):
    return {
        verdict["bar"]: (pytest.approx(verdict["found"]), verdict["holds"]) for verdict in verdicts
    }


def test_bars_of_dense_products_are_ratios_to_the_vendors():
    cube = "8192 x 8192 x 8192"
    rows = [row("forward", "a", "ours", 10), row("forward", "a", gemm.BLOCK, 12)]
    rows += [row("forward", cube, "ours", 10), row("forward", cube, gemm.BLOCK, 9, 1147.0)]
    # Each against its own shape, whichever others have failed.
    rows += [row("weight gradient", "24576 x 1536 of 4096", "ours, accumulating", 1, 846.0)]
    rows += [row("weight gradient", "24576 x 1536 of 4096", "ours", 1, 9999.0)]
    found = by_bar(gemm.judge(rows))
    assert found["M = 4096 over cuBLASLt, geometric mean"] == ((1.2 * 0.9) ** 0.5, False)
    assert found["M = 4096 over cuBLASLt, least"] == (0.9, False)
    assert found["weight gradient over DeepGEMM there, geometric mean"] == (1.0, True)


def test_bars_of_grouped_products():
    rows = [row("FP8 by rows", "8 groups, a", "ours", 10, 1000.0)]
    rows += [row("FP8 by rows", "8 groups, a", grouped.PRECISE, 13)]
    rows += [row("FP8, skewed", "8 groups, a", "ours", 11, 850.0)]
    found = by_bar(grouped.judge(rows))
    assert found["FP8 by rows over torch precise, geometric mean"] == (1.3, True)
    assert found["skewed over equal groups, least"] == (0.85, False)


def test_bars_of_quantisation_are_shares_of_a_copy():
    rows = [row("rows", "a", "ours", 10), row("rows", "a", quantize.COPY, 9)]
    found = by_bar(quantize.judge(rows))
    assert found["rows: bandwidth over a copy's, geometric mean"] == (0.9, True)


@pytest.mark.parametrize("groups", grouped.GROUPS)
def test_skewed_groups_have_one_of_eight_times_the_mean_and_empty_ones(groups):
    sizes = grouped.skewed(groups)
    assert sizes.sum() <= grouped.ROWS and np.all(sizes % 128 == 0)
    assert sizes.max() >= min(8 * grouped.ROWS // groups, grouped.ROWS - 512)
    assert np.sum(sizes == 0) >= groups // 4


def test_operands_are_finite_and_differ_each_time():
    codes, _ = weight_specs(144, 272)
    one, other = random_array(codes), random_array(codes)
    assert one.dtype == F8 and one.shape == (144, 384)
    assert np.all(np.isfinite(one.astype(np.float32)))
    assert np.any(one.astype(np.float32) != other.astype(np.float32))


def test_a_report_holds_rows_bars_and_where_they_are_from(tmp_path, capsys):
    rows = [{"section": "s", "shape": "a", "kernel": "ours", "TFLOP/s": 900.0, "FLOP/byte": 300.0}]
    bars = [kernel_report.verdict("fast", 1.2, 1.15), kernel_report.verdict("off", 3, 2, most=True)]
    kernel_report.report("gemm", rows, bars, out=tmp_path, notes={"clock": "CUPTI"})
    record = json.loads((tmp_path / "gemm.json").read_text())
    assert record["rows"] == rows and record["clock"] == "CUPTI"
    assert [bar["holds"] for bar in record["verdicts"]] == [True, False]
    assert {"card", "commit", "date", "jax"} <= set(record)
    assert (tmp_path / "gemm.svg").read_text().startswith("<svg")
    assert "bench gemm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code, ended",
    [("print('{\"bar\": 1}')", 1), ("print('{}'); raise SystemExit(1)", 0), ("input()", 0)],
    ids=["ends", "fails", "hangs"],
)
def test_checks_that_do_not_end_are_a_bar_missed(code, ended, monkeypatch):
    monkeypatch.setattr(kernel_run, "CHECK_SECONDS", 2)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    *_, last = kernel_run.finish_checks("gemm", process)
    assert last["found"] == ended and last["holds"] == bool(ended)
    process.stdin.close()


class FakeCupti:
    """Reports two kernels of a millisecond for each run, beside the flush's."""

    def __init__(self, monkeypatch):
        self.running = []
        monkeypatch.setattr(kernel_time, "load_cupti", lambda: self)

    def _cupti_init(self):
        self.running.clear()

    def _cupti_get_timings(self, finalize):
        return [record for name in self.running for record in ((name, 1.0), (name, 0.5))]


def test_times_are_those_of_the_calls_without_the_flush(monkeypatch):
    cupti = FakeCupti(monkeypatch)
    timer = kernel_time.Timer.__new__(kernel_time.Timer)
    timer._flush = {False: lambda: cupti.running.append("negate")}
    timer._torch, timer._names, timer.torch_method = None, {False: {"negate"}}, "CUPTI"
    call = kernel_time.Call(lambda: cupti.running.append("product"))
    assert timer.measure(call) == 1500.0
    twice = kernel_time.Call(lambda: cupti.running.extend(["product", "sum"]))
    assert timer.compare({"a": call, "b": twice}) == {"a": 1500.0, "b": 3000.0}
    # Where a recording lost a flush, each call is measured by itself.
    monkeypatch.setattr(timer, "_spans", lambda calls: [])
    assert timer.compare({"a": call, "b": twice}) == {"a": 1500.0, "b": 3000.0}
    with pytest.raises(RuntimeError, match="CUPTI saw no kernel"):
        timer.measure(kernel_time.Call(lambda: None))


def test_a_case_becomes_rows_and_what_fails_is_noted(monkeypatch):
    spec = jax.ShapeDtypeStruct
    add = kernel_run.Program(lambda a, b: a + b, (spec((4, 8), F32),) * 2, carried=True)
    bad = kernel_run.Program(lambda a: a @ a, (spec((4, 8), F32),))
    case = kernel_run.Case("s", "4 x 8", 64.0, 32.0, {"ours": add, "bad": bad})

    class Timer:
        method = torch_method = "CUPTI"

        def __init__(self, torch):
            pass

        def compare(self, calls):
            first, second = (np.asarray(calls["ours"].run()) for _ in range(2))
            assert not np.array_equal(first, second)
            return dict.fromkeys(calls, 2.0)

    monkeypatch.setattr(kernel_run, "Timer", Timer)
    rows, notes = kernel_run.time_cases([case], peers=False, until=float("inf"))
    (row,) = rows
    assert row["kernel"] == "ours" and row["FLOP/byte"] == 2.0
    assert row["TFLOP/s"] == pytest.approx(32e-6) and row["GB/s"] == pytest.approx(0.016)
    assert notes["failed"].startswith("s, 4 x 8, bad: TypeError")
    rows, notes = kernel_run.time_cases([case], peers=False, until=0)
    assert rows == [] and notes["cases left out"] == 1


@pytest.mark.parametrize("command", ["kernels", *FAMILIES])
def test_without_a_gpu_it_is_one_line(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-jax", "bench", command])
    assert main() == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: bench {command} times kernels on a Hopper GPU")
    assert len(printed.splitlines()) == 1
