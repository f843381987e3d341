"""`bench tune`: tiles for every shape of the kernel benchmarks, measured, written into the ops."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.bench.kernel_run import Case, calls_of, default_jobs, use_cache
from experiments.bench.kernel_time import Timer, require_gpu
from experiments.bench.tune_choices import CHOICES, Choice, Tiles
from experiments.provenance import ROOT, provenance
from experiments.tables import print_table

# What a new choice must gain to replace the present one.
GAIN = 1.005
# Seconds that a process takes to begin.
STARTING = 20


@dataclass(frozen=True)
class BenchTuneArgs:
    """Measure tiles for the shapes of the kernel benchmarks and write the fastest into tables.

    Every variant first runs in a process beside this one, with a time limit: one that hangs or
    fails is left out. The rest take turns on the same data, their results must agree, and the
    fastest replaces the present choice if it gains half a percent. The tables are
    pallas_kernels/*/tuned.py; each is written as soon as a shape is measured.
    """

    family: Annotated[Literal["all", "gemm", "grouped", "quantize"], tyro.conf.Positional]
    """Which benchmark's shapes; all: those that a training step gains most from come first."""
    only: str = ""
    """Choices whose name contains this; all by default."""
    jobs: int = dataclasses.field(default_factory=default_jobs)
    """Processes that compile and try variants."""
    seconds: float = 40
    """How long one variant may take to compile and run once."""
    limit: float = 240
    """Seconds after which no further choice is measured."""
    write: bool = True
    """Write the tables; otherwise only print what was found."""


def bench_tune(args: BenchTuneArgs) -> None:
    """Tries, measures and writes; about four minutes for all on an H200 with 16 cores."""
    require_gpu("bench tune", torch=False)
    use_cache()
    began = time.monotonic()
    chosen = [choice for choice in CHOICES[args.family]() if args.only in choice.name]
    if not chosen:
        raise ValueError(f"no choice of {args.family} has {args.only!r} in its name")
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, dict[tuple, tuple[Tiles, str]]]] = {}
    with Trials(args, chosen) as trials:
        timer = Timer(torch=False)
        for choice in chosen:
            if not trials.ended(choice, began + args.limit - time.monotonic()):
                print(f"left out: {choice.name}")
                continue
            failed = trials.failed
            names = [name for name in choice.variants if (choice.name, name) not in failed]
            row, winner = measure(timer, choice, names)
            rows.append(row)
            print(f"{round(time.monotonic() - began)} s", *row.values(), sep="; ", flush=True)
            if winner is not None:
                entry = (choice.variants[winner], row["found"])
                tables = found.setdefault(choice.op, {})
                tables.setdefault(choice.table, {})[choice.key] = entry
                if args.write:
                    write_tables(choice.op, tables)
    for (name, variant), why in trials.failed.items():
        print(f"{name} {variant}: {why}")
    print_table(rows, title=f"bench tune {args.family}, {round(time.monotonic() - began)} s")


def measure(timer: Timer, choice: Choice, names: Sequence[str]) -> tuple[dict, str | None]:
    """A row of times over that of the present choice, and the winner if it is a new one."""
    if not names:
        return {"choice": choice.name, "found": "no variant ran"}, None
    programs = {name: choice.program(choice.variants[name]) for name in names}
    case = Case("", "", choice.flops, choice.bytes, programs)
    failed: list[str] = []
    calls = calls_of(case, False, failed)
    if names[0] not in calls:
        return {"choice": choice.name, "found": "; ".join(failed)}, None
    first, *others = [(name, output(call.run())) for name, call in calls.items()]
    wrong = [name for name, result in others if not agree(first[1], result)]
    times = timer.compare({name: call for name, call in calls.items() if name not in wrong})
    best = min(times, key=times.get)
    rate = lambda us: (
        f"{choice.flops / us / 1e6:.0f} TFLOP/s"
        if choice.flops
        else f"{choice.bytes / us / 1e3:.0f} GB/s"
    )
    present = names[0]
    gain = times[present] / times[best]
    text = f"{rate(times[best])}, before {rate(times[present])}"
    relative = ", ".join(f"{name} {times[present] / us:.3f}" for name, us in times.items())
    row = {"choice": choice.name, "best": best, "found": text, "over the present": relative}
    if wrong:
        row["wrong"] = ", ".join(wrong)
    return row, best if best != present and gain >= GAIN else None


def output(result: Any) -> np.ndarray:
    """Some rows (and groups) of the first array of a result, on the host."""
    array = jax.tree.leaves(result)[0]
    array = array[::8, ::7] if array.ndim == 3 else array[::7]
    return np.asarray(array).astype(np.float32)


def agree(one: np.ndarray, other: np.ndarray) -> bool:
    size = np.linalg.norm(one)
    return bool(np.linalg.norm(one - other) <= 1e-3 * size)


class Trials:
    """Every variant compiled and run once on zeros, in order, by processes beside this one.

    They go on while the choices before are measured: a run takes milliseconds, which a median of
    thirty does not see.
    """

    def __init__(self, args: BenchTuneArgs, chosen: Sequence[Choice]):
        self.failed: dict[tuple[str, str], str] = {}
        self._args = args
        self._todo = [(choice.name, variant) for choice in chosen for variant in choice.variants]
        self._left = {choice.name: len(choice.variants) for choice in chosen}
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._try_some) for _ in range(args.jobs)]

    def __enter__(self) -> "Trials":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._todo.clear()
        for thread in self._threads:
            thread.join()

    def ended(self, choice: Choice, seconds: float) -> bool:
        """Whether all variants of a choice have been tried, within so many seconds."""
        if seconds <= 0:
            return False
        with self._changed:
            return self._changed.wait_for(lambda: not self._left[choice.name], seconds)

    def _try_some(self) -> None:
        """Hands variants to a process one by one; one that is silent too long is replaced."""
        worker = None
        while True:
            with self._changed:
                if not self._todo:
                    break
                item = self._todo.pop(0)
            if worker is None:
                worker = start_worker(self._args.family)
            worker.stdin.write(json.dumps(item) + "\n")
            worker.stdin.flush()
            timer = threading.Timer(self._args.seconds + STARTING, worker.kill)
            timer.start()
            answer = worker.stdout.readline().strip()
            timer.cancel()
            if not answer:
                worker.kill()
                end(worker)
                worker = None
            with self._changed:
                if answer != "ok":
                    limit = self._args.seconds + STARTING
                    self.failed[item] = answer or f"hung or died within {limit:g} s"
                self._left[item[0]] -= 1
                self._changed.notify_all()
        if worker is not None:
            end(worker)


def end(worker: subprocess.Popen) -> None:
    """Closes the pipes, at which a worker that lives ends, and waits for it."""
    worker.stdin.close()
    worker.stdout.close()
    worker.wait()


def start_worker(family: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.bench.tune", family]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)


def work(family: str) -> None:
    """Runs the variants named on stdin, each once on zeros, and answers a line for each."""
    use_cache()
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    choices = {choice.name: choice for choice in CHOICES[family]()}
    for line in sys.stdin:
        name, variant = json.loads(line)
        try:
            program = choices[name].program(choices[name].variants[variant])
            zeros = lambda x: (
                jnp.asarray(x) if isinstance(x, np.ndarray) else jnp.zeros(x.shape, x.dtype)
            )
            jax.block_until_ready(program.compile()(*map(zeros, program.operands)))
            print("ok", file=answers, flush=True)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            print(f"{type(error).__name__}: {text}", file=answers, flush=True)


def write_tables(op: str, tables: Mapping[str, Mapping[tuple, tuple]]) -> None:
    """Replaces entries of an op's tuned.py and keeps the others."""
    path = Path(ROOT, "pallas_kernels", op, "tuned.py")
    text = path.read_text()
    origin = provenance()
    card = f"{origin['card']}, {origin['date']}, commit {origin['commit'] or 'unknown'}"
    for table, entries in tables.items():
        lines = written(text, table)
        for key, (tiles, measured) in entries.items():
            comment = f"    # {measured}; {card}.\n" if measured else ""
            lines[key] = f"{comment}    {key}: {show_tiles(tiles)},\n"
        head, _, rest = text.partition(f"{table}: ")
        kind, _, rest = rest.partition(" = {")
        rest = rest[rest.index("}\n") + 1 :]
        body = "\n" + "".join(lines[key] for key in sorted(lines)) if lines else ""
        text = f"{head}{table}: {kind} = {{{body}}}{rest}"
    path.write_text(text)


def written(text: str, table: str) -> dict[tuple, str]:
    """The lines of each entry of a table in a file, its comment included."""
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and node.target.id == table:
            begins, found = node.lineno, {}
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                found[ast.literal_eval(key)] = "".join(lines[begins : value.end_lineno])
                begins = value.end_lineno
            return found
    return {}


def show_tiles(tiles: Tiles) -> str:
    """The call that makes these tiles, defaults left out."""
    given = [
        f"{field.name}={getattr(tiles, field.name)!r}"
        for field in dataclasses.fields(tiles)
        if getattr(tiles, field.name) != field.default
    ]
    call = f"{type(tiles).__module__.rpartition('.')[2]}.Tiles("
    if sum(map(len, given)) + 2 * len(given) < 60:
        return f"{call}{', '.join(given)})"
    lines = textwrap.wrap(", ".join(given), 88)
    return call + "\n" + "".join(f"        {line}\n" for line in lines) + "    )"


if __name__ == "__main__":
    work(sys.argv[1])
