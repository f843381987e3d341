"""What a process of `bench mesh` does: compiles train steps on meshes, or runs them one by one.

`python -m experiments.bench.mesh_case WORD FILE [PROCESSES]` writes one line of JSON for each case
of the file; WORD is `compile` or `measure`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.training import init_state, make_train_step
from experiments.bench.children import answer
from experiments.bench.exposed import collectives, waits
from experiments.bench.kernel_run import brief
from experiments.bench.kernels import traced
from experiments.planning.compile import abstract_arguments, setup_of
from experiments.planning.setup import Setup
from experiments.train import planned_bytes
from sharding.mesh import make_mesh
from sharding.replicas import differing_replicas

WARM_UP = 2


def main() -> None:
    """The words of the command line."""
    word, path, *count = sys.argv[1:]
    answer(__spec__.name, compiled if word == "compile" else measured, path, *count)


def program(setup: Setup) -> tuple[jax.sharding.Mesh, Any, Any]:
    """The mesh, the compiled step, and the batch as a shape that knows where it lies."""
    devices = jax.devices()
    if len(devices) < setup.cluster.devices:
        raise ValueError(
            f"{setup.cluster.name} needs {setup.cluster.devices} devices, there are {len(devices)}"
        )
    mesh = make_mesh(devices[: setup.cluster.devices], **setup.mesh)
    state, batch = abstract_arguments(setup, mesh)
    step = make_train_step(setup.run, mesh, setup.scheme).lower(state, batch).compile()
    return mesh, step, batch["tokens"]


def compiled(case: dict[str, Any]) -> dict[str, Any]:
    """Fills the cache of programs that `measured` finds them in."""
    began = time.perf_counter()
    _, step, _ = program(setup_of(case["setup"]))
    return {"compiled": planned_bytes(step), "seconds": time.perf_counter() - began}


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and losses of steps, expert counts of the first, memory, replicas, a profile."""
    setup = setup_of(case["setup"])
    began = time.perf_counter()
    mesh, step, where = program(setup)
    found: dict[str, Any] = {"compiled": planned_bytes(step), "seconds": [], "losses": []}
    found["compile seconds"] = time.perf_counter() - began
    before = peak()
    state = init_state(setup.run, mesh)
    for batch in batches(setup, where, case["steps"]):
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


def profile(step: Callable[[], Any], compiled_step: Any, setup: Setup) -> dict[str, Any] | None:
    """Communication in one step; None where the profiler sees no GPU. The state is used up."""
    events = traced(lambda: jax.block_until_ready(step()))
    found = waits(events, collectives(compiled_step.as_text(), setup.mesh))
    return None if found is None else found._asdict()


if __name__ == "__main__":
    main()
