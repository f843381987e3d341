"""What `bench mesh` leaves behind: rows, verdicts on them, a picture."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.bench.kernel_report import verdict
from experiments.bench.mesh_cases import GIB, Case
from experiments.planning.measure import spearman
from experiments.planning.setup import mesh_name
from experiments.plots import new_figure, svg
from experiments.provenance import code_and_day
from experiments.tables import print_table

# Tokens/s of a device over those of one alone, at least: by precision and mesh.
EFFICIENCY = {
    ("bf16", "data"): 0.92, ("bf16", "fsdp"): 0.92, ("bf16", "expert"): 0.85,
    ("fp8", "data"): 0.88, ("fp8", "fsdp"): 0.88, ("fp8", "expert"): 0.85,
}  # fmt: skip
# Losses relative to those of one device, at most.
LOSSES = {"bf16": 2e-3, "fp32": 1e-5}

Row = dict[str, Any]


def rows(
    cases: Sequence[Case], found: Mapping[str, Row], planned: Mapping[str, Row]
) -> list[Row]:
    """The table: measured and foreseen, and what differs from one device."""
    alone = {
        (c.recipe, c.precision, c.sequences): rate(c, found[c.key])
        for c in cases if c.role == "alone" and "seconds" in found.get(c.key, {})
    }  # fmt: skip
    references = {(c.recipe, c.precision): found.get(c.key, {})
                  for c in cases if c.role == "reference"}  # fmt: skip
    return [
        row(c, found.get(c.key), planned.get(c.key, {}),
            alone.get((c.recipe, c.precision, c.sequences)),
            references.get((c.recipe, c.precision), {}))
        for c in cases
    ]  # fmt: skip


def row(
    case: Case, found: Row | None, planned: Row, alone: float | None, reference: Row
) -> Row:
    names = {"alone": "one device", "reference": "one device, all tokens"}
    made: Row = {
        "recipe": case.recipe,
        "precision": case.precision,
        "mesh": names.get(case.role) or mesh_name(case.setup.mesh),
        "processes": case.processes,
        "micro-batch": case.sequences,
    }
    found = found or {"error": "not yet run"}
    seconds = statistics.median(found["seconds"]) if found.get("seconds") else None
    measured, expected = found.get("peak"), planned.get("bytes")
    made |= {
        "ms": seconds and 1000 * seconds,
        "ms predicted": 1000 * case.seconds,
        "tokens/s": rate(case, found) if seconds else None,
        "efficiency": rate(case, found) / case.devices / alone
        if seconds and alone and case.role == "mesh" else None,
        "GiB": measured and measured / GIB,
        "GiB planned": expected and expected / GIB,
        "GiB compiled": found.get("compiled") and found["compiled"] / GIB,
    }  # fmt: skip
    waits = found.get("waits")
    if waits:
        made |= {"ms sending": waits["running"], "ms exposed": waits["exposed"]}
    if case.role == "mesh" and "losses" in found and "losses" in reference:
        n = min(len(found["losses"]), len(reference["losses"]))
        ours, theirs = np.array(found["losses"][:n]), np.array(reference["losses"][:n])
        made["steps"] = n
        made["loss differs"] = float(np.max(np.abs(ours / theirs - 1)))
        counts = np.array(found["counts"]), np.array(reference["counts"])
        # A choice that differs is missed in one count and too many in another.
        made["choices differ"] = int(np.abs(counts[0] - counts[1]).sum()) // 2
        made["of choices"] = int(counts[1].sum())
    if case.role == "mesh":
        made["replicas differ"] = found.get("differing")
    made["note"] = found.get("error") or found.get("note") or planned.get("note")
    return made


def rate(case: Case, found: Row) -> float:
    """Tokens a second."""
    return case.setup.step_tokens / statistics.median(found["seconds"])


def exposed(cases: Sequence[Case], found: Mapping[str, Row]) -> list[Row]:
    """Communication of each profiled step by collective and mesh axis."""
    made = []
    for case in cases:
        waits = found.get(case.key, {}).get("waits")
        for part in waits["rows"] if waits and case.role == "mesh" else ():
            where = {"recipe": case.recipe, "precision": case.precision,
                     "mesh": mesh_name(case.setup.mesh), "processes": case.processes,
                     "micro-batch": case.sequences}  # fmt: skip
            made.append({**where, **part, "of step": part["ms exposed"] / waits["window"]})
    return made


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """The bars, each on the rows that it speaks of."""
    made: list[Row] = []
    meshes = [r for r in rows if r["efficiency"] is not None or "loss differs" in r]
    for precision, most in LOSSES.items():
        judged = [r for r in meshes if r["precision"] == precision and "loss differs" in r]
        if judged:
            worst = max(judged, key=lambda r: r["loss differs"])
            made += [
                verdict(f"losses in {precision} beside one device, worst {worst['mesh']}",
                        worst["loss differs"], most, most=True),
                verdict(f"expert choices of step 0 in {precision} that differ",
                        max(r["choices differ"] for r in judged), 0, most=True),
            ]  # fmt: skip
    compared = [r["replicas differ"] for r in meshes if r["replicas differ"] is not None]
    if compared:
        made.append(verdict("elements of replicas that differ", max(compared), 0, most=True))
    largest = max((r["micro-batch"] for r in meshes), default=0)
    for r in meshes:
        least = EFFICIENCY.get((r["precision"], r["mesh"].partition("=")[0]))
        if least and r["efficiency"] and r["micro-batch"] == largest and "," not in r["mesh"]:
            name = f"weak scaling in {r['precision']}, {r['mesh']}"
            name += f", {r['processes']} processes" if r["processes"] > 1 else ""
            made.append(verdict(name, r["efficiency"], least))
    # The plan is made without the device, the program with it.
    for name, column in (("the plan", "GiB planned"), ("the compiled program", "GiB compiled")):
        memory = [(abs(r["GiB"] / r[column] - 1), r) for r in rows if r["GiB"] and r[column]]
        if memory:
            off, worst = max(memory, key=lambda item: item[0])
            name = f"memory beside {name}, worst {worst['precision']} {worst['mesh']}"
            made.append(verdict(name, off, 0.05, most=True))
    ranked = ranked_rows(rows)
    if len(ranked) > 2:
        rank = spearman([r["ms predicted"] for r in ranked], [r["ms"] for r in ranked])
        made.append(verdict(f"Spearman over {len(ranked)} meshes and micro-batches", rank, 0.8))
    return made


def ranked_rows(rows: Sequence[Row]) -> list[Row]:
    """Steps of equal tokens in the first precision, which alone has all micro-batches."""
    found = [r for r in rows if r["efficiency"] is not None and r["processes"] == 1 and r["ms"]]
    first = [(r["recipe"], r["precision"]) for r in found][:1]
    return [r for r in found if (r["recipe"], r["precision"]) in first]


def origin(host: Mapping[str, Any]) -> Row:
    """Which cards, code and day the figures are of."""
    return {"card": f"{host['count']} x {host['kind']}", **code_and_day()}


def show(report: Row) -> None:
    """Prints the tables; columns that hold nothing are left out, notes come last."""
    rows, exposed, verdicts = (report[name] for name in ("rows", "exposed", "verdicts"))
    origin = [value for value in report.values() if value and not isinstance(value, list | dict)]
    title = "bench mesh, " + ", ".join(map(str, origin))
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [n for n in names if any(row.get(n) is not None for row in rows)]
    names.sort(key=lambda name: name == "note")
    print_table([{name: row.get(name) for name in names} for row in rows], title=title)
    if exposed:
        print_table(exposed, title="communication in one step, mean of the devices")
    if verdicts:
        print_table(verdicts, title="bench mesh: bars")


def picture(rows: Sequence[Row]) -> str:
    """Predicted against measured times of a step, one mark a row, one colour a mesh."""
    figure, axes = new_figure(height=3.8)
    shown = [r for r in rows if r["ms"] and r["efficiency"] is not None]
    for name in dict.fromkeys((r["precision"], r["mesh"]) for r in shown):
        points = [r for r in shown if (r["precision"], r["mesh"]) == name]
        axes.plot(
            [r["ms predicted"] for r in points], [r["ms"] for r in points], label=" ".join(name),
            marker="o" if name[0] == "bf16" else "s", markersize=4, linewidth=0.8,
        )  # fmt: skip
        for r in points:
            axes.annotate(str(r["micro-batch"]), (r["ms predicted"], r["ms"]), fontsize=7,
                          xytext=(4, 3), textcoords="offset points")  # fmt: skip
    if shown:
        ends = [r[key] for r in shown for key in ("ms", "ms predicted")]
        line = [min(ends) / 1.1, max(ends) * 1.1]
        axes.plot(line, line, color="gray", linewidth=0.8, linestyle="--")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("ms of a step, predicted (numbers: sequences in a micro-batch)")
    axes.set_title("ms measured", loc="left", fontsize=10.5)
    axes.margins(0.06)
    return svg(figure)
