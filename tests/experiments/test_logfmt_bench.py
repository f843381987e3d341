"""`bench logfmt` without a GPU: its programs lower, its bars are the ratios that they say."""

import jax
import pytest

from experiments.bench import logfmt
from tests.experiments import runs
from tests.pallas_kernels.lowering import HOPPER, kernels_in, on


@pytest.mark.parametrize("case", logfmt.cases()[:4], ids=lambda case: case.section)
def test_programs_lower_for_hopper(case):
    for name, program in case.programs.items():
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.operands]
        with on(HOPPER):
            traced = jax.jit(program.function).trace(*specs)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert kernels_in(text) == (name == "ours")


def row(section, kernel, us):
    return {"section": section, "shape": "a", "kernel": kernel, "us": us}


def test_bars_are_shares_of_a_copy_and_the_overhead_over_one():
    rows = [
        row("encode 8 bits", "ours", 20), row("encode 8 bits", logfmt.COPY, 15),
        row("encode 8 bits", logfmt.MOVED, 16), row("decode 8 bits", "ours", 18),
        row("decode 8 bits", logfmt.COPY, 9), row("decode 8 bits", logfmt.MOVED, 16),
    ]  # fmt: skip
    found = {v["bar"]: (pytest.approx(v["found"]), v["holds"]) for v in logfmt.judge(rows)}
    assert found["encode 8 bits: bandwidth over a copy's"] == (0.75, True)
    assert found["decode 8 bits: bandwidth over a copy's"] == (0.5, False)
    overhead = "8 bits: % over copying the BF16 rows (paper: 50 to 100, fused)"
    assert found[overhead] == (18.75, True)


def test_a_machine_without_a_gpu_is_told_so():
    code, out, err = runs.call("bench", "logfmt")
    assert code == 2 and err.count("\n") == 1 and "Hopper GPU" in err


@pytest.mark.slow
def test_checks_hold_for_the_reference():
    rows = list(logfmt.checks())
    assert len(rows) == 7 * 6 and [row for row in rows if not row["holds"]] == []
