"""A disk that fills: one line, and nothing left that looks whole."""

import subprocess
import sys

import pytest

from tests.experiments import runs


def test_a_disk_that_tokens_fill(trained, tmp_path):
    with runs.files_limited_to(100):
        code, _, err = runs.call(*runs.launch_words(tmp_path / "run", trained.data))
    runs.refused(code, err, str(tmp_path / "run" / "data"), "free space there")
    runs.nothing_whole(tmp_path / "run")


LIMITED = """
import resource, sys
{}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from experiments.__main__ import main
sys.exit(main())
"""


# As if the disk had had room when writing began.
FILLING = "from deepseek_jax.checkpoint import Checkpoints as C; C._check_room = lambda *_: None"


@pytest.mark.parametrize("before", ["", FILLING], ids=["before", "while-it-is-written"])
def test_a_disk_that_a_checkpoint_fills(before, trained, compile_cache, tmp_path):
    run = tmp_path / "run"
    # Programs are read from the cache, but none of those limited files is written there.
    never = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(before), *runs.launch_words(run, trained.data)],
        env=runs.child_environment(compile_cache) | never, capture_output=True, text=True,
    )
    parts = str(run / "checkpoints"), "free space there and resume"
    runs.refused(done.returncode, done.stderr, *parts)
    # Where there is no room to begin with, not a step is trained.
    assert (run / "metrics.jsonl").exists() == bool(before)
    assert not (run / "summary.json").exists() and not (run / "report.html").exists()
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
