"""Runs train steps on the devices of this machine, each setup in a process of its own.

`python -m experiments.planning.measure` reads setups from stdin, one a line, and writes the seconds
of their steps.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from experiments.planning import targets
from experiments.planning.compile import setup_of, words_of
from experiments.planning.setup import Setup

STEPS = 5


def measure(setup: Setup, *, steps: int = STEPS) -> list[float]:
    """Seconds of so many steps after two others.

    Raises:
      ValueError: the process failed; its last line is the message.
    """
    target = setup.cluster.accelerator.platform
    words = {**words_of(setup, target), "steps": steps}
    environment = targets.environment(setup.cluster, target)
    if target != "cpu":
        del environment["JAX_PLATFORMS"]
    done = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(words),
                          env=environment, capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"running {setup.name}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """The child: a setup from stdin, seconds to stdout."""
    words = json.loads(sys.stdin.read())
    print(json.dumps(measured_here(setup_of(words), words["steps"])))


def measured_here(setup: Setup, steps: int) -> list[float]:
    """Times the step on devices of this process."""
    import jax
    import numpy as np

    from deepseek_jax.training import init_state, make_train_step
    from experiments.planning.compile import batch_sharding
    from sharding.mesh import make_mesh

    run = setup.run
    devices = jax.devices()[: setup.cluster.devices]
    if len(devices) < setup.cluster.devices:
        raise ValueError(f"{setup.cluster.name} needs {setup.cluster.devices} devices, "
                         f"this machine has {len(devices)}")  # fmt: skip
    mesh = make_mesh(devices, **setup.mesh)
    shape = (setup.accumulation, run.micro_batch, run.seq_len + 1)
    tokens = np.random.default_rng(run.seed).integers(0, run.config.vocab_size, shape)
    batch = {"tokens": jax.device_put(tokens.astype(np.int32), batch_sharding(mesh))}
    state = init_state(run, mesh)
    step = make_train_step(run, mesh, setup.scheme).lower(state, batch).compile()
    seconds = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


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
