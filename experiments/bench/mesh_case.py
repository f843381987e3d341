"""What a process of `bench mesh` does: compiles train steps on meshes, waits, and runs them.

`python -m experiments.bench.mesh_case COMPILE MEASURE FILE [PROCESSES]` writes a line of JSON for
each case of the file when all are compiled, and one more when it has run, the smallest first. It
compiles as soon as the file COMPILE exists and runs as soon as MEASURE does; - is not waited for.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.training import make_init, make_train_step
from experiments.bench.children import Row, answer, attempt
from experiments.bench.exposed import collectives, waits
from experiments.bench.kernel_run import brief
from experiments.bench.kernels import traced
from experiments.planning.compile import abstract_arguments, setup_of
from experiments.planning.setup import Setup
from experiments.processes import is_first
from experiments.train import planned_bytes
from sharding.mesh import make_mesh
from sharding.replicas import differing_replicas

NO_TURN = "-"
WARM_UP = 2


class Program(NamedTuple):
    """The step of a setup and what makes its first state, lowered or compiled."""

    mesh: jax.sharding.Mesh
    step: Any
    init: Any
    tokens: jax.ShapeDtypeStruct  # knows where a batch lies

    def compiled(self) -> "Program":
        return self._replace(step=self.step.compile(), init=self.init.compile())

    @property
    def bytes(self) -> int:
        """What the step holds at once on a device."""
        return planned_bytes(self.step)


def main() -> None:
    """The words of the command line."""
    compile_turn, measure_turn, path, *count = sys.argv[1:]
    programs: dict[str, Program | Exception] = {}

    def prepare(cases: list[Row]) -> list[Row]:
        lower = lambda case: lowered(setup_of(case["setup"]))
        found = [attempt(lower, case) for case in cases]
        wait_for(compile_turn)
        began = time.perf_counter()
        # XLA compiles without Python's lock.
        with ThreadPoolExecutor(len(cases)) as pool:
            found = list(pool.map(lambda program: attempt(Program.compiled, program), found))
        programs.update(zip((case["key"] for case in cases), found, strict=True))
        seconds = time.perf_counter() - began
        for key, program in programs.items():
            size = 0 if isinstance(program, Exception) else program.bytes
            if is_first():
                row = {"key": key, "compiled": size, "compile seconds": seconds}
                print(json.dumps(row), flush=True)
        wait_for(measure_turn)
        # The peak of a process is then that of the last case that has run.
        return sorted(cases, key=lambda case: getattr(programs[case["key"]], "bytes", 0))

    work = lambda case: measured(case, programs[case["key"]])
    answer(__spec__.name, work, path, *count, prepare=prepare)


def wait_for(turn: str) -> None:
    """Until the file is there; ends the process if its parent has."""
    parent = os.getppid()
    while turn != NO_TURN and not Path(turn).exists():
        if os.getppid() != parent:
            raise SystemExit("the process that waits for the results has ended")
        time.sleep(0.05)


def lowered(setup: Setup) -> Program:
    """The programs of a setup on the first devices of this process."""
    devices = jax.devices()
    if len(devices) < setup.cluster.devices:
        raise ValueError(
            f"{setup.cluster.name} needs {setup.cluster.devices} devices, there are {len(devices)}"
        )
    mesh = make_mesh(devices[: setup.cluster.devices], **setup.mesh)
    state, batch = abstract_arguments(setup, mesh)
    step = make_train_step(setup.run, mesh, setup.scheme).lower(state, batch)
    return Program(mesh, step, make_init(setup.run, mesh).lower(), batch["tokens"])


def measured(case: Row, program: Program | Exception) -> Row:
    """Seconds and losses of steps, expert counts of the first, memory, replicas, a profile."""
    if isinstance(program, Exception):
        raise program
    setup, mesh, step = setup_of(case["setup"]), program.mesh, program.step
    needed, has = program.bytes, setup.cluster.accelerator.memory
    if needed > has:
        raise ValueError(
            f"not run: the compiled step needs {needed / 2**30:.1f} GiB, "
            f"a device has {has / 2**30:.0f}"
        )
    found: Row = {"compiled": needed, "seconds": [], "losses": []}
    before = peak()
    state = program.init()
    for batch in batches(setup, program.tokens, case["steps"]):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        found["seconds"].append(time.perf_counter() - began)
        found["losses"].append(float(metrics["loss"]))
        if int(metrics["lost"]):
            room = setup.scheme.room
            raise ValueError(f"dispatch had no room at {room:g} times an even load")
        if "counts" not in found:
            found["counts"] = np.asarray(metrics["expert_counts_LE"]).tolist()
    found["seconds"] = found["seconds"][WARM_UP:]
    # Only what rose above the cases before is this one's own.
    found["peak"] = peak() if peak() > before else None
    # What comes now must not cost the row its times.
    extras = {
        "differing": lambda: differing_replicas(state, mesh),
        "waits": lambda: profile(lambda: step(state, batch), step, setup),
    }
    for name, extra in extras.items() if case["inspected"] else ():
        try:
            found[name] = extra()
        except Exception as error:
            found.setdefault("note", f"{name}: {brief(error)}")
    return found


def peak() -> int:
    """Bytes that this process has held at once on one of its devices so far."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(s.get("peak_bytes_in_use", 0) for s in stats)


def batches(setup: Setup, where: jax.ShapeDtypeStruct, steps: int) -> Iterator[dict[str, Any]]:
    """Batches of uniformly drawn tokens: each step's sequences are the same on any mesh."""
    shape = where.shape
    for index in range(steps):
        draw = np.random.default_rng((setup.run.seed, index))
        tokens = draw.integers(0, setup.run.config.vocab_size, (shape[0] * shape[1], shape[2]))
        tokens = tokens.astype(np.int32).reshape(shape)
        placed = jax.make_array_from_callback(
            shape, where.sharding, lambda part, tokens=tokens: tokens[part]
        )
        yield {"tokens": jax.block_until_ready(placed)}


def profile(step: Callable[[], Any], compiled_step: Any, setup: Setup) -> Row | None:
    """Communication in one step; None where the profiler sees no GPU. The state is used up."""
    events = traced(lambda: jax.block_until_ready(step()))
    found = waits(events, collectives(compiled_step.as_text(), setup.mesh))
    return None if found is None else found._asdict()


if __name__ == "__main__":
    main()
