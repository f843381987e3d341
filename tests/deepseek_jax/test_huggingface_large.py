"""DeepSeek-V3's true shapes in sparse files: what the audit takes, what loading a layer takes.

To be run alone: the layer needs 12 GB of memory.
"""

import dataclasses
import os
import sys

import pytest

from deepseek_jax import configs
from tests.parity.sparse import write_sparse
from tests.peak_memory import run_measured

pytestmark = pytest.mark.slow
AUDIT = """
import sys, time
from pathlib import Path
from deepseek_jax.huggingface_checkpoint import open_checkpoint
from experiments.convert import audit
began = time.perf_counter()
rows = sum(1 for _ in audit(open_checkpoint(Path(sys.argv[1]))))
print(rows, time.perf_counter() - began)
"""
LOAD = """
import sys
import jax
import deepseek_jax as ds
from sharding import make_mesh
precision = ds.Precision(weights="fp8", activations="bf16", matmul="bf16")
model = ds.load_huggingface(sys.argv[1], precision=precision, mesh=make_mesh(expert=8))
gate = model.moe.ffn.w_gate_EFD.get_value().codes
assert gate.sharding.shard_shape(gate.shape)[1] == gate.shape[1] // 8
fp8 = sum(leaf.nbytes for leaf in jax.tree.leaves(model) if leaf.dtype.itemsize == 1)
print(fp8)
"""


def run(code, folder):
    """The numbers that the program prints, and its peak memory in bytes."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}  # fmt: skip
    command = [sys.executable, "-c", code, str(folder)]
    done, peak = run_measured(command, folder.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return [*map(float, done.stdout.split()), peak]


def test_the_whole_checkpoint_is_audited_in_a_minute_and_two_gigabytes(tmp_path):
    size = write_sparse(tmp_path / "v3", configs.deepseek_v3())
    assert size == pytest.approx(688.6e9, rel=1e-3)
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "v3").iterdir()) < 50e6
    rows, seconds, peak = run(AUDIT, tmp_path / "v3")
    assert rows == 91_991 and seconds < 60 and peak < 2e9


def test_a_layer_takes_little_more_memory_than_its_bytes(tmp_path):
    config = dataclasses.replace(
        configs.deepseek_v3(), num_layers=1, num_dense_layers=0, num_mtp=0, vocab_size=64
    )
    write_sparse(tmp_path / "layer", config, files=4)
    fp8, peak = run(LOAD, tmp_path / "layer")
    assert fp8 == pytest.approx(11.5e9, rel=0.01) and peak < 1.25 * fp8
