"""`sweep`: every legal mesh, micro-batch and remat policy of a recipe on a cluster, ranked."""

import csv
import dataclasses
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from deepseek_jax.config import Precision, Run, Schedule
from experiments.bench.children import devices_of_host
from experiments.files import whole
from experiments.planning import targets
from experiments.planning.choose import REACHED, Candidate, candidates, prediction
from experiments.planning.compare import compared
from experiments.planning.compile import compile_setup
from experiments.planning.fit import fit, is_fitted
from experiments.planning.measure import measure, spearman
from experiments.planning.notes import Notes
from experiments.planning.picture import Point, draw
from experiments.planning.setup import mesh_name
from experiments.recipes import recipe
from experiments.tables import print_table, write_json
from sharding.cost import Reached
from sharding.hardware import Cluster, cluster

GIB = 2**30
# What is fitted to be faster than this part of the hardware's figures limits no step.
FREE = 1e6


@dataclass(frozen=True)
class SweepArgs:
    """Cost all meshes of a recipe on a cluster, compile the best, rank them, draw them.

    Results lie in a folder and are taken up again when the sweep is run once more.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "deepseek_v3"
    """Name of the recipe."""
    cluster: str = "h200x2048"
    """ACCELERATORxDEVICES: h800, h100, h200, gb200, v5p, v6e, tpu7x or cpu."""
    precision: str | None = None
    """fp32, bf16 or fp8; the recipe's by default."""
    batch: int | None = None
    """Sequences of a step; those of the recipe's last steps by default."""
    best: int = 20
    """How many to compile: the fastest of each mesh first, then the next."""
    measure: bool = False
    """Run those on the devices of this machine instead."""
    out: Path | None = None
    """The folder; sweeps/RECIPE-CLUSTER, with what else was chosen, by default."""
    json: Path | None = None
    """Also write the rows to this file."""


@dataclass(frozen=True)
class Row:
    """One setup; bytes are on one device, seconds are of a step."""

    rank: int
    data: int
    fsdp: int
    expert: int
    tensor: int
    sequences: int  # of a device in a micro-batch
    accumulation: int
    remat: str
    seconds: float
    exposed: float  # communication that work does not hide
    bytes: float
    fits: bool
    front: bool  # no other setup needs less memory and less time
    compiled_bytes: int | None = None
    compiled_sent: float | None = None
    refused: str | None = None
    measured: float | None = None  # median

    @property
    def mesh(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("data", "fsdp", "expert", "tensor")}

    @property
    def name(self) -> str:
        return f"{mesh_name(self.mesh)}, {self.sequences} a micro-batch, remat {self.remat}"


def sweep_command(args: SweepArgs) -> None:
    """Prints the best rows and says where everything lies."""
    chosen = (args.recipe, args.cluster, args.precision, args.batch)
    out = args.out or Path("sweeps") / "-".join(str(c) for c in chosen if c is not None)
    if args.best < 0:
        raise ValueError(f"--best {args.best} must be at least 0")
    run, where = run_of(args), cluster(args.cluster)
    rows, reached = swept(run, where, best=args.best, measured=args.measure, out=out, say=print)
    shown = [r for r in rows if r.compiled_bytes or r.measured or r.refused] or rows[: args.best]
    print_table([readable(row) for row in shown], title=f"{args.recipe} on {where.name}")
    fitting = [row for row in rows if row.fits]
    if fitting:
        print(explanation(run, where, fitting[0], reached))
    print(f"{len(rows)} setups, {len({mesh_name(r.mesh) for r in rows})} meshes; table.csv, "
          f"table.json and picture.png are in {out}")  # fmt: skip
    if args.json is not None:
        write_json(args.json, [dataclasses.asdict(row) for row in rows])


def run_of(args: SweepArgs) -> Run:
    """The recipe's run in the wanted precision, with steps of so many sequences."""
    run = recipe(args.recipe)(None)
    if args.precision is not None:
        run = dataclasses.replace(run, precision=Precision.of(args.precision))
    if args.batch is not None:
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch} must be at least 1")
        sequences = Schedule.constant(args.batch)
        run = dataclasses.replace(run, micro_batch=args.batch, batch_size=sequences)
    return run


def sweep(
    run: Run | str,
    where: Cluster | str,
    *,
    best: int = 0,
    measured: bool = False,
    out: Path | None = None,
    say=lambda line: None,
) -> list[Row]:
    """All legal setups as rows, those that fit first, the fastest first.

    Args:
      run: a run, or the name of a recipe.
      where: a cluster, or its name.
      best: how many to compile for the cluster's own compiler, where it is installed.
      measured: run those on this machine's devices instead.
      out: a folder for the table, the picture, and what was compiled and measured so far.
    """
    run = recipe(run)(None) if isinstance(run, str) else run
    where = cluster(where) if isinstance(where, str) else where
    return swept(run, where, best=best, measured=measured, out=out, say=say).rows


class Swept(NamedTuple):
    """The rows, and the constants that predict their seconds."""

    rows: list[Row]
    reached: Reached


def swept(
    run: Run, where: Cluster, *, best: int, measured: bool, out: Path | None, say
) -> Swept:
    """Costs all setups, compiles or measures a shortlist, and ranks."""
    reached = REACHED[where.accelerator.platform]
    found = candidates(run, where)
    notes = Notes(out)
    chosen = shortlist(found, best)
    say(f"{len(found)} setups costed, {sum(c.fits for c in found)} fit by formula")
    wanted = int(run.batch_size.phases[-1].end)
    made = sorted({c.setup.accumulation * c.setup.run.micro_batch for c in found} - {wanted})
    if made:
        sizes = " or ".join(f"{n:,}" for n in made)
        say(f"steps of {wanted:,} sequences are not whole on these devices: {sizes} are costed")
    if chosen and not measured:
        compile_all(chosen, notes, say)
    if measured:
        check_devices(where)
        todo = [c.setup for c in chosen if notes.get("measured", c.setup) is None]
        for index, (setup, seconds) in enumerate(measure(todo), start=1):
            failed = isinstance(seconds, str)
            notes.add("measured", setup, {"failed" if failed else "seconds": seconds})
            took = seconds if failed else f"{statistics.median(seconds):.3f} s"
            say(f"  measured {index}/{len(todo)} {setup.name}: {took}")
        reached = fitted(chosen, reached, notes, say)
        found = candidates(run, where, reached)
    rows = table(found, notes)
    if out is not None:
        write(rows, out, title=f"{len(rows)} setups of a train step on {where.name}", where=where)
    return Swept(rows, reached)


def check_devices(where: Cluster) -> None:
    """Refuses to measure on other devices than the cluster's, whose seconds would stand for them.

    CPU devices are made as they are wanted.
    """
    if where.accelerator.platform == "cpu":
        return
    found = devices_of_host()
    if found["kind"] != where.accelerator.kind or found["count"] < where.devices:
        raise ValueError(
            f"--measure needs {where.devices} x {where.accelerator.kind}, and this machine has "
            f"{found['count']} x {found['kind']}"
        )


def shortlist(found: Sequence[Candidate], best: int) -> list[Candidate]:
    """The fastest of each mesh, and where meshes are few, the next ones."""
    first: dict[str, Candidate] = {}
    for c in found:
        if c.fits:
            first.setdefault(mesh_name(c.setup.mesh), c)
    chosen = list(first.values())[:best]
    rest = [c for c in found if c.fits and c not in chosen]
    return chosen + rest[: best - len(chosen)]


def compile_all(chosen: Sequence[Candidate], notes: Notes, say) -> None:
    """Compiles those that have not been, on all cores; what fails is said and left out."""
    target = chosen[0].setup.cluster.accelerator.platform
    reason = targets.missing(target)
    if reason is not None:
        say(f"  nothing is compiled: {reason}")
        return
    todo = [c for c in chosen if notes.get("compiled", c.setup) is None]

    def one(c: Candidate) -> None:
        try:
            found = compile_setup(c.setup, target)
        except ValueError as error:
            say(f"  {error}")
            return
        sent = sum(t.compiled for t in compared(c.setup, found.collectives))
        notes.add("compiled", c.setup, {
            "bytes": found.peak, "sent": sent, "refused": found.refused,
            "cpu_seconds": found.cpu_seconds, "warnings": list(found.warnings),
        })  # fmt: skip
        held = f"{found.peak / GIB:.1f} GiB" if found.refused is None else "does not fit"
        say(f"  compiled {c.setup.name}: {held}, {found.cpu_seconds:.0f} s of processor time")

    pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2))
    try:
        list(pool.map(one, todo))
    finally:
        # Interrupted, it does not wait for what is being compiled, which ends with this process.
        pool.shutdown(wait=False, cancel_futures=True)


def fitted(chosen: Sequence[Candidate], reached: Reached, notes: Notes, say) -> Reached:
    """Constants fitted on the measured meshes that are named for it; says how the others rank."""
    notes_of = {c.setup.name: notes.get("measured", c.setup) for c in chosen}
    times = {name: statistics.median(note["seconds"])
             for name, note in notes_of.items() if "seconds" in note}  # fmt: skip
    chosen = [c for c in chosen if c.setup.name in times]
    basis = [c for c in chosen if is_fitted(c.setup.mesh)]
    if len(basis) >= 5:
        reached = fit([c.setup for c in basis], [times[c.setup.name] for c in basis])
        parts = {name: getattr(reached, name) for name in ("products", "memory", "network")}
        shown = ", ".join(f"{name} {part:.2f}" for name, part in parts.items() if part < FREE)
        say(f"  fitted on {len(basis)} meshes: of the hardware's figures they reach {shown}")
    judged = [c for c in chosen if c not in basis] if len(basis) >= 5 else chosen
    if len(judged) > 2:
        predicted = [prediction(c.setup, reached).seconds for c in judged]
        rank = spearman(predicted, [times[c.setup.name] for c in judged])
        say(f"  Spearman's rank correlation over {len(judged)} others: {rank:.3f}")
    return reached


def table(found: Iterable[Candidate], notes: Notes) -> list[Row]:
    """Rows in order; the Pareto front is that of the setups that fit."""
    rows, least = [], float("inf")
    for rank, c in enumerate(found, start=1):
        front = c.fits and c.bytes < least
        least = min(least, c.bytes) if c.fits else least
        compiled = notes.get("compiled", c.setup) or {}
        timed = notes.get("measured", c.setup) or {}
        rows.append(Row(
            rank=rank, **c.setup.mesh, sequences=c.setup.sequences,
            accumulation=c.setup.accumulation, remat=c.setup.run.remat, seconds=c.seconds,
            exposed=c.exposed, bytes=c.bytes, fits=c.fits, front=front,
            compiled_bytes=compiled.get("bytes") or None, compiled_sent=compiled.get("sent"),
            refused=compiled.get("refused") or timed.get("failed"),
            measured=statistics.median(timed["seconds"]) if "seconds" in timed else None,
        ))  # fmt: skip
    return rows


def write(rows: Sequence[Row], out: Path, *, title: str, where: Cluster) -> None:
    """table.csv, table.json, picture.png."""
    with whole(out / "table.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    write_json(out / "table.json", [dataclasses.asdict(row) for row in rows])
    points = [
        Point(r.bytes / GIB, r.seconds, r.fits, r.front,
              r.compiled_bytes / GIB if r.compiled_bytes else None, r.measured, r.name)
        for r in rows
    ]  # fmt: skip
    draw(points, out / "picture.png", title=title, memory_gib=where.accelerator.memory / GIB)


def readable(row: Row) -> dict:
    """A row of the printed table."""
    return {
        "rank": row.rank, "mesh": mesh_name(row.mesh), "sequences": row.sequences,
        "accumulation": row.accumulation, "remat": row.remat, "s predicted": row.seconds,
        "s exposed": row.exposed, "s measured": row.measured, "GiB formula": row.bytes / GIB,
        "GiB compiled": row.compiled_bytes / GIB if row.compiled_bytes else None,
        "front": row.front, "refused": row.refused and row.refused[:60],
    }  # fmt: skip


def explanation(run: Run, where: Cluster, best: Row, reached: Reached | None = None) -> str:
    """Why the best setup is the best: what its step waits for, and what the neighbours lose."""
    found = {c.setup.name: c for c in candidates(run, where, reached)}
    chosen = next(
        c for c in found.values() if c.setup.mesh == best.mesh
        and (c.setup.sequences, c.setup.run.remat) == (best.sequences, best.remat)
    )  # fmt: skip
    expected = prediction(chosen.setup, reached)
    work = max(expected.work_by_part.items(), key=lambda item: item[1])
    lines = [
        f"The best shape is {best.name}: {best.seconds:.3g} s a step, of which work takes "
        f"{expected.work:.3g} s (most of it {work[0]}, {work[1]:.3g} s) and communication that "
        f"work does not hide {expected.exposed:.3g} s."
    ]
    sent = sorted(expected.communication_by_part.items(), key=lambda item: -item[1])[:3]
    if sent:
        parts = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in sent)
        lines.append(f"It sends most for {parts}.")
    for what, changed in neighbours(chosen, list(found.values())):
        verb = "does not fit" if not changed.fits else f"takes {changed.seconds:.3g} s"
        lines.append(f"With {what} it {verb} ({changed.bytes / GIB:.3g} GiB).")
    has = where.accelerator.memory / GIB
    lines.append(f"It needs about {best.bytes / GIB:.3g} of {has:.3g} GiB.")
    return " ".join(lines)


def neighbours(chosen: Candidate, found: Sequence[Candidate]) -> list[tuple[str, Candidate]]:
    """The setups that differ from a chosen one in one choice, the best of each choice."""
    same = lambda c, *names: all(
        getattr(c.setup, n, getattr(c.setup.run, n, None))
        == getattr(chosen.setup, n, getattr(chosen.setup.run, n, None)) for n in names
    )  # fmt: skip
    remat = lambda c: c.setup.run.remat == chosen.setup.run.remat
    choices = (
        ("another micro-batch", lambda c: same(c, "mesh") and remat(c)),
        ("another remat policy", lambda c: same(c, "mesh", "sequences")),
        ("another expert axis", lambda c: same(c, "sequences") and remat(c)
         and c.setup.mesh["tensor"] == chosen.setup.mesh["tensor"]
         and c.setup.mesh["expert"] != chosen.setup.mesh["expert"]),
        ("another tensor axis", lambda c: c.setup.mesh["tensor"] != chosen.setup.mesh["tensor"]),
    )  # fmt: skip
    nearest = []
    for what, alike in choices:
        others = [c for c in found if c is not chosen and alike(c)]
        if others:
            other = min(others, key=lambda c: (not c.fits, c.seconds))
            setup = other.setup
            nearest.append((f"{what} ({setup.name.replace(' zero=3', '')})", other))
    return nearest
