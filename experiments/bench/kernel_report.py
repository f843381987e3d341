"""What kernel benchmarks leave behind: a table, verdicts, a roofline picture, and JSON."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.plots import logarithmic, new_figure, svg
from experiments.provenance import provenance
from experiments.tables import plain, print_table, write_json
from sharding.hardware import ACCELERATORS


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def verdict(bar: str, found: float, limit: float, *, most: bool = False) -> dict[str, Any]:
    """A row of the verdicts: at least the limit, or at most."""
    holds = found <= limit if most else found >= limit
    return {"bar": bar, "found": found, "limit": limit, "holds": bool(holds)}


def figures(work: Mapping[str, float | None], microseconds: float) -> dict[str, float]:
    """TFLOP/s and GB/s of work (flops, bytes where they are known) that took so long."""
    found = {"us": microseconds}
    if work["bytes"] is not None:
        found["GB/s"] = work["bytes"] / microseconds / 1e3
    return found | ({"TFLOP/s": work["flops"] / microseconds / 1e6} if work["flops"] else {})


def report(
    command: str,
    rows: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    *,
    out: Path,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Prints the tables, writes COMMAND.json and COMMAND.svg into `out`, and returns the former."""
    origin = {**provenance(), **notes}
    title = f"bench {command}, " + ", ".join(str(v) for v in origin.values() if v)
    print_table(rows, title=title)
    if verdicts:
        print_table(verdicts, title=f"bench {command}: bars")
    out.mkdir(parents=True, exist_ok=True)
    record = {**origin, "rows": list(rows), "verdicts": list(verdicts)}
    write_json(out / f"{command}.json", plain(record))
    (out / f"{command}.svg").write_text(roofline(rows) + "\n")
    return record


def roofline(rows: Sequence[Mapping[str, Any]]) -> str:
    """TFLOP/s over intensity under the card's roof (or GB/s over size); ours large, peers small."""
    figure, axes = new_figure(height=3.6)
    products = [row for row in rows if row.get("TFLOP/s") and row.get("FLOP/byte")]
    rate, key = ("TFLOP/s", "FLOP/byte") if products else ("GB/s", "MB")
    shown = products or [row for row in rows if row.get("MB")]
    for label in dict.fromkeys(row["kernel"] for row in shown):
        points = [(row[key], row[rate]) for row in shown if row["kernel"] == label]
        style = {"s": 22} if label.startswith("ours") else {"s": 14, "alpha": 0.6}
        axes.scatter(*zip(*points, strict=True), label=label, **style)
    card = next((a for a in ACCELERATORS.values() if a.kind == jax.devices()[0].device_kind), None)
    if products and card is not None:
        edges = sorted(row[key] for row in products)
        knee = card.flops_fp8 / card.memory_bandwidth
        x = sorted({edges[0] / 1.2, min(knee, edges[-1]), edges[-1] * 1.2})
        roof = [min(i * card.memory_bandwidth, card.flops_fp8) / 1e12 for i in x]
        axes.plot(x, roof, color="gray", linewidth=1, label="datasheet, FP8 and memory")
    axes.set_xscale("log")
    axes.set_xlabel("FLOP a byte that must move" if products else "MB that must move")
    axes.set_title(rate, loc="left", fontsize=10.5)
    if products:
        logarithmic(axes)
    if shown:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.margins(x=0.03)
    return svg(figure)
