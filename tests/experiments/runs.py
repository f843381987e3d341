"""A run of the command line small enough for tests, and what such runs leave behind."""

import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from experiments.__main__ import main
from experiments.eval import load_run
from experiments.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 4
# Everything a state can hold: two micro-batches, an average, MTP, documents kept apart.
SETTINGS = """
config.vocab_size=300 config.model_dim=16 config.num_layers=1 config.num_dense_layers=0
config.num_heads=2 config.content_head_dim=6 config.rotary_head_dim=4 config.value_head_dim=5
config.query_latent_dim=12 config.kv_latent_dim=8 config.expert_ffn_dim=10 config.num_experts=8
config.num_mtp=1 config.max_length=64 config.init_std=0.02 seq_len=20 micro_batch=2 batch_size=4
learning_rate=0.01 ema_decay=0.5 mask_documents=True keep_checkpoints=2
""".split() + [f"checkpoint_every={EVERY}"]
# What depends on the clock, and nothing else, may differ between two runs.
TIMES = ("seconds", "tokens_per_second", "mfu_causal", "mfu_full")


def write_text(folder: Path) -> Path:
    """A folder of a few documents made of a few words."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    for number in range(40):
        lines = [" ".join(draw.choices(words, k=8)) for _ in range(draw.randint(4, 12))]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


def launch_words(
    run: Path, data: Path, *more: str, settings: tuple[str, ...] = (), steps: int = STEPS
) -> list[str]:
    """The words that launch a small run."""
    return ["launch", "--run", str(run), "--data", str(data), "--steps", str(steps), *more,
            "--set", *SETTINGS, *settings]


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process."""
    argv = ["experiments/__main__.py", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out):
        with contextlib.redirect_stderr(err):
            try:
                code = main()
            except SystemExit as stop:
                code = stop.code
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def files_limited_to(size):
    """No file of this process can grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def child_environment(cache: Path, *, optimized: bool = False) -> dict[str, str]:
    """Of a process that finds our packages, and programs compiled before in a folder."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if optimized else "1",
    }


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in entries]


def record(run: Path) -> dict:
    """config.json."""
    return json.loads((run / "config.json").read_text())


def final_state(run: Path):
    """The state of the last checkpoint, in numpy."""
    return jax.tree.map(np.asarray, load_run(RunDirectory(run))[1])


def assert_same_run(run: Path, expected: Path, *, steps: int = STEPS) -> None:
    """Metrics and every array of the last checkpoint agree bit for bit."""
    assert metrics(run) == metrics(expected)
    state, wanted = final_state(run), final_state(expected)
    assert state.ema is not None and int(state.step) == steps
    for field in dataclasses.fields(state):
        left, right = getattr(state, field.name), getattr(wanted, field.name)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True
        ):
            where = f"{field.name}{jax.tree_util.keystr(path)}"
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), where


def refused(code: int, err: str, *parts: str) -> None:
    """Holds an error against what it must say."""
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "DEEPSEEK_JAX_TRACEBACK" not in err, err
    for part in parts:
        assert part in err


def nothing_whole(run) -> None:
    """Nothing there that eval, sample, --resume or a reader would take for a run."""
    for name in ("config.json", "metrics.jsonl", "summary.json", "report.html"):
        assert not (run / name).exists()
    assert not list(run.glob("checkpoints/*")) and not list(run.glob("**/.*partial*"))
