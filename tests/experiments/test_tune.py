"""`bench tune` without a GPU: its variants lower, its tables are written and read back."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.bench import tune, tune_choices
from experiments.bench.tune import BenchTuneArgs
from experiments.bench.tune_choices import CHOICES
from pallas_kernels import block_scaled
from pallas_kernels.matmul_fp8 import hopper, tuned


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemm", "grouped", "quantize"])
def test_every_variant_lowers_for_hopper(family):
    seen = set()
    for choice in CHOICES[family]():
        for tiles in choice.variants.values():
            if (choice.op, choice.table, tiles) in seen:
                continue
            seen.add((choice.op, choice.table, tiles))
            program = choice.program(tiles)
            specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.operands]
            traced = jax.jit(program.function).trace(*specs)
            assert traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("family", CHOICES)
def test_entries_are_for_tables_that_exist_and_the_present_tiles_come_first(family):
    choices = list(CHOICES[family]())
    assert len({choice.name for choice in choices}) == len(choices)
    for choice in choices:
        module = importlib.import_module(f"pallas_kernels.{choice.op}.tuned")
        assert isinstance(getattr(module, choice.table), dict)
        assert next(iter(choice.variants)) == "present"
        assert len(set(choice.variants.values())) == len(choice.variants) > 1


def test_a_table_in_which_a_variant_is_written_is_read_back(tmp_path, monkeypatch):
    source = Path(tuned.__file__).read_text()
    folder = tmp_path / "pallas_kernels" / "matmul_fp8"
    folder.mkdir(parents=True)
    (folder / "tuned.py").write_text(source)
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    tiles = block_scaled.Tiles(band=4, pair=False)
    few = block_scaled.Tiles(1, 32, 12, 32, 1, pair=False, memory_registers=40)
    new = {"TILES": {(48, 256): (tiles, "9 TFLOP/s")}, "FEW": {(64, 48, 256): (few, "1 us")}}
    tune.write_tables("matmul_fp8", new)
    text = (folder / "tuned.py").read_text()
    comments = {line for line in source.splitlines() if line.startswith("    # ")}
    assert comments <= set(text.splitlines())
    assert "# 9 TFLOP/s; " in text and "block_scaled.Tiles(band=4, pair=False)" in text
    names = {}
    exec(compile(text, "tuned.py", "exec"), names)
    assert names["TILES"] == tuned.TILES | {(48, 256): tiles}
    assert names["FEW"] == tuned.FEW | {(64, 48, 256): few}
    assert names["GRADIENT_TILES"] == tuned.GRADIENT_TILES


def test_measured_tiles_are_used_with_balanced_row_tiles(monkeypatch):
    tiles, few = block_scaled.Tiles(band=4), block_scaled.Tiles(1, 32, 12, 32, 1, pair=False)
    monkeypatch.setitem(tuned.TILES, (4096, 256), tiles)
    monkeypatch.setitem(tuned.FEW, (64, 4096, 256), few)
    found = hopper.tiles_of(4096, 4096, 256, 132)
    assert found.band == 4 and found.row_tiles == 24
    assert hopper.tiles_of(8, 4096, 256, 132) == few


def test_results_that_differ_by_more_than_rounding_do_not_agree():
    one = np.linspace(-1, 1, 100, dtype=np.float32)
    assert tune.agree(one, one * 1.0001)
    assert not tune.agree(one, one[::-1]) and not tune.agree(one, one * np.float32(np.nan))


FAKE = """
import json, sys, time
for line in sys.stdin:
    _, variant = json.loads(line)
    if variant == "hangs":
        time.sleep(60)
    if variant == "dies":
        raise SystemExit(1)
    print("ok" if variant == "runs" else "ValueError: no room", flush=True)
"""


def test_variants_that_hang_or_fail_are_left_out(monkeypatch):
    start = lambda family: tune.subprocess.Popen(
        [sys.executable, "-c", FAKE],
        stdin=tune.subprocess.PIPE,
        stdout=tune.subprocess.PIPE,
        text=True,
    )
    monkeypatch.setattr(tune, "start_worker", start)
    variants = dict.fromkeys(("runs", "hangs", "dies", "fails"))
    choice = tune_choices.Choice("op", "T", (1,), variants, lambda tiles: None, 1.0, 1.0)
    monkeypatch.setattr(tune, "STARTING", 1)
    args = BenchTuneArgs("gemm", jobs=2, seconds=1)
    with tune.Trials(args, [choice]) as trials:
        assert not trials.ended(choice, 0)
        assert trials.ended(choice, 30)
    failed = trials.failed
    assert {variant for _, variant in failed} == {"hangs", "dies", "fails"}
    assert failed[choice.name, "fails"] == "ValueError: no room"


def test_without_a_gpu_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-jax", "bench", "tune", "gemm"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: bench tune times kernels on a Hopper GPU")
