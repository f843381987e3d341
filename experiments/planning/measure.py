"""Runs train steps on the devices of this machine, each setup in a process of its own.

`python -m experiments.planning.measure` reads a setup from stdin, compiles its step and says so,
waits for another line, and writes the seconds of the steps. So that many setups can be compiled at
once and yet each be timed alone.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from deepseek_jax.config import Run
from experiments.planning import targets
from experiments.planning.compile import setup_of, words_of
from experiments.planning.setup import Setup
from experiments.supervision import end_with_parent

STEPS = 5
COMPILED = "compiled"


def measure(
    setups: Sequence[Setup], *, steps: int = STEPS
) -> Iterator[tuple[Setup, list[float] | str]]:
    """Each setup with the seconds of so many steps after two others, or with what failed.

    Half as many as there are cores are compiled at once; while one is timed, nothing else runs.
    Those that wait hold memory of the device, so what fails beside them runs once more alone.
    """
    at_once = max(1, (os.cpu_count() or 1) // 2)
    for begin in range(0, len(setups), at_once):
        again = []
        with ExitStack() as stack:
            children = [
                (setup, stack.enter_context(_Child(setup, steps)))
                for setup in setups[begin : begin + at_once]
            ]
            for setup, child in children:
                try:
                    child.read()
                except ValueError:
                    again.append(setup)
            for setup, child in children:
                if setup in again:
                    continue
                try:
                    yield setup, child.timed()
                except ValueError:
                    again.append(setup)
        for setup in again:
            with _Child(setup, steps) as child:
                try:
                    child.read()
                    seconds = child.timed()
                except ValueError as error:
                    yield setup, str(error)
                else:
                    yield setup, seconds


class _Child:
    """A process that has a setup: `read` waits for its next line."""

    def __init__(self, setup: Setup, steps: int):
        target = setup.cluster.accelerator.platform
        environment = targets.environment(setup.cluster, target)
        if target != "cpu":
            del environment["JAX_PLATFORMS"]
            # Processes share the card: none may take most of its memory at its start.
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        self.name = setup.name
        self.errors = tempfile.TemporaryFile("w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], env=environment, text=True, **pipes
        )
        self.tell(json.dumps({**words_of(setup, target), "steps": steps}))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()

    def tell(self, line: str) -> None:
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # What it died of is read with its next line.

    def read(self) -> str:
        line = self.process.stdout.readline().strip()
        if line:
            return line
        code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
        raise ValueError(f"running {self.name}: {last}")

    def timed(self) -> list[float]:
        self.tell("go")
        seconds = json.loads(self.read())
        self.process.wait()
        return seconds


def main() -> None:
    """The child: a setup from stdin, seconds to stdout."""
    end_with_parent()
    words = json.loads(sys.stdin.readline())

    def compiled() -> None:
        print(COMPILED, flush=True)
        sys.stdin.readline()

    print(json.dumps(measured_here(setup_of(words), words["steps"], compiled)), flush=True)


def measured_here(
    setup: Setup, steps: int, compiled: Callable[[], None] = lambda: None
) -> list[float]:
    """Times the step on devices of this process, after `compiled` has returned."""
    import jax

    from deepseek_jax.training import init_state, make_train_step
    from experiments.planning.compile import abstract_arguments
    from sharding.mesh import make_mesh

    run = setup.run
    devices = jax.devices()[: setup.cluster.devices]
    if len(devices) < setup.cluster.devices:
        raise ValueError(f"{setup.cluster.name} needs {setup.cluster.devices} devices, "
                         f"this machine has {len(devices)}")  # fmt: skip
    mesh = make_mesh(devices, **setup.mesh)
    shapes = abstract_arguments(setup, mesh)
    step = make_train_step(run, mesh, setup.scheme).lower(*shapes).compile()
    compiled()
    batch, state = random_batch(run, shapes[1]), init_state(run, mesh)
    seconds = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def random_batch(run: Run, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens at random, where the step wants them; in each sequence one document, if it asks."""
    import jax
    import numpy as np

    tokens = np.random.default_rng(run.seed).integers(
        0, run.config.vocab_size, shapes["tokens"].shape
    )
    values = {"tokens": tokens, "segments": np.zeros_like(tokens)}
    return {
        name: jax.device_put(values[name].astype(where.dtype), where.sharding)
        for name, where in shapes.items()
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; ties share the mean of their ranks.

    >>> spearman([1, 2, 3], [10, 20, 40]), spearman([1, 2, 3], [3, 2, 1])
    (1.0, -1.0)
    """

    def ranks(values):
        order = sorted(values)
        first = {v: order.index(v) for v in values}
        return [first[v] + (order.count(v) - 1) / 2 for v in values]

    return statistics.correlation(ranks(a), ranks(b))


if __name__ == "__main__":
    main()
