"""Compiles a train step for devices that need not be there, in a process of its own.

`python -m experiments.planning.compile` reads a Setup from stdin and writes what it read off the
compiled program as one line of JSON.
"""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

from deepseek_jax.config import Run, from_json, to_json
from experiments.planning import targets
from experiments.planning.hlo import Array, Collective, read
from experiments.planning.setup import Setup
from experiments.planning.targets import Target
from experiments.supervision import end_with_parent
from sharding.hardware import cluster
from sharding.placement import Scheme


class Compiled(NamedTuple):
    """What a compiler says of a step; bytes are on one device."""

    target: str  # the device that was compiled for
    refused: str | None  # why the compiler would not have it
    needs: int | None  # bytes that it asks for where it refused
    arguments: int
    temporary: int
    peak: int
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    repeated: tuple[str, ...]  # kernels that were lowered more than once for equal operands
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    lower_seconds: float
    compile_seconds: float
    cpu_seconds: float  # of the compiling process, all in all
    host_gib: float  # its most memory


def compile_setup(setup: Setup, target: Target, *, limit: float | None = None) -> Compiled:
    """Compiles in a child process, so that its devices and its memory are its own.

    Raises:
      ValueError: the child failed; its last line is the message.
      KeyboardInterrupt: it was interrupted, as Ctrl-C does to it too.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(words_of(setup, target)),
        env=targets.environment(setup.cluster, target),
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"compiling {setup.name} for {setup.cluster.name}: {last}")
    found = compiled_of(json.loads(done.stdout.strip().splitlines()[-1]))
    warned = [line for line in done.stderr.splitlines() if "nvoluntary full remat" in line]
    return found._replace(warnings=tuple(dict.fromkeys(warned)))


def words_of(setup: Setup, target: Target) -> dict[str, Any]:
    """A setup as JSON holds it."""
    return {
        "run": to_json(setup.run),
        "cluster": setup.cluster.name,
        "mesh": dict(setup.mesh),
        "scheme": dataclasses.asdict(setup.scheme),
        "target": target,
    }


def setup_of(words: dict[str, Any]) -> Setup:
    """The inverse of `words_of`."""
    return Setup(
        from_json(Run, words["run"]), cluster(words["cluster"]), words["mesh"],
        Scheme(**words["scheme"]),
    )  # fmt: skip


def compiled_of(fields: dict[str, Any]) -> Compiled:
    """The inverse of writing a Compiled as JSON."""
    array = lambda item: Array(item[0], tuple(item[1]))
    made = [
        Collective(c[0], tuple(c[1]), c[2], tuple(map(array, c[3])), c[4], c[5])
        for c in fields["collectives"]
    ]
    lists = {name: tuple(fields[name]) for name in ("repeated", "warnings", "notes")}
    return Compiled(**{**fields, **lists, "collectives": tuple(made)})


def main() -> None:
    """The child: stdin to stdout."""
    # In the midst of a compilation Python would see neither an interrupt nor the parent's end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
    words = json.loads(sys.stdin.read())
    print(json.dumps(compiled_here(setup_of(words), words["target"])._asdict()))


def compiled_here(setup: Setup, target: Target) -> Compiled:
    """Lowers and compiles the step in this process, which must have been made for the target."""
    import resource

    import jax

    from deepseek_jax.training import make_train_step
    from sharding.mesh import make_mesh

    notes = []
    if target == "gpu":
        from experiments.planning import stand_in

        stand_in.install()
        notes.append(stand_in.NOTE)
    mesh = make_mesh(targets.devices(setup.cluster, target), **setup.mesh)
    state, batch = abstract_arguments(setup, mesh)
    began = time.perf_counter()
    lowered = make_train_step(setup.run, mesh, setup.scheme).lower(state, batch)
    lowered_in = time.perf_counter() - began
    repeated = repeated_kernels(lowered.as_text()) if target == "gpu" else ()
    began = time.perf_counter()
    empty = Compiled(mesh.devices.flat[0].device_kind, None, None, 0, 0, 0, (), {}, repeated, (),
                     tuple(notes), lowered_in, 0.0, 0.0, 0.0)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return empty._replace(refused=first_sentence(str(error)), needs=asked_for(str(error)),
                              compile_seconds=time.perf_counter() - began)
    compiled_in = time.perf_counter() - began
    sizes, found = program.memory_analysis(), read(program.as_text(), setup.mesh)
    # Where the compiler gives no peak of its own: donated buffers are counted once.
    whole = (sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
             + sizes.output_size_in_bytes - sizes.alias_size_in_bytes)  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = whole if target == "cpu" else max(sizes.peak_memory_in_bytes, 0) or whole
    return empty._replace(
        arguments=int(sizes.argument_size_in_bytes),
        temporary=int(sizes.temp_size_in_bytes),
        peak=int(peak),
        collectives=found.collectives,
        kernels=dict(found.kernels),
        compile_seconds=compiled_in,
        cpu_seconds=used.ru_utime + used.ru_stime,
        host_gib=used.ru_maxrss / 2**20,
    )


def abstract_arguments(setup: Setup, mesh) -> tuple[Any, dict[str, Any]]:
    """State and batch as shapes that know where they lie."""
    import jax
    import numpy as np

    from deepseek_jax.training import abstract_state, state_shardings
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    state = jax.tree.map(place, abstract_state(setup.run), state_shardings(setup.run, mesh))
    shape = (setup.accumulation, setup.run.micro_batch, setup.run.seq_len + 1)
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))
    names = ("tokens", "segments") if setup.run.mask_documents else ("tokens",)
    return state, dict.fromkeys(names, tokens)


def batch_sharding(mesh):
    """Where a batch [accumulation, B, T + 1] lies."""
    import jax

    from sharding.rules import BATCH_AXES

    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, BATCH_AXES))


def repeated_kernels(text: str) -> tuple[str, ...]:
    """Kernels that a lowered program holds more than once; equal calls should share a function."""
    bodies = Counter(re.findall(r"@mosaic_gpu_v2\([^\n]*?(?:kernel_hash = \"([^\"]*)\")", text))
    if bodies.total() == len(bodies):
        return ()
    return (f"{bodies.total()} kernels were lowered, {len(bodies)} of them different",)


def asked_for(message: str) -> int | None:
    """Bytes that a compiler says it needs, the largest it names."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = [float(n) * scale[unit] for n, unit in re.findall(r"([\d.]+)([KMGT])i?B?\b", message)]
    return int(max(found)) if found else None


def first_sentence(message: str) -> str:
    return " ".join(message.split())[:300]


if __name__ == "__main__":
    main()
