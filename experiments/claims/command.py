"""`claims`: the paper's tables and figures, computed again and judged; `claims NAME` explains."""

import difflib
import inspect
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.claims.claim import (
    DISAGREES,
    NOT_HERE,
    NOT_YET,
    RESULTS,
    WRONG,
    Claim,
    Result,
    evaluate,
    judge,
)
from experiments.claims.measured import measure
from experiments.claims.page import write_page
from experiments.claims.table import CLAIMS, SUBJECTS
from experiments.tables import print_table, show, write_json

PAGE = Path("runs") / "claims.html"


@dataclass(frozen=True)
class ClaimsArgs:
    """Compute the paper's tables and figures again and say for each value whether it holds.

    Without names all of them, a minute on two cores, and a page with the figures. One name is
    explained in words; several, or a subject, are a table.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Claims (kv_cache, figure_7, ...) or subjects (memory, network, ...)."""
    json: Path | None = None
    """Also write the rows to this file."""
    html: Path | None = None
    """Where the page goes: runs/claims.html when all claims are computed, else nowhere."""
    measure: Path | None = None
    """First measure on this H200 what claims need of one, into this folder: experiments/results."""
    data: tuple[str, ...] = ()
    """With --measure, text or token shards to train on; Python's library by default."""


def claims(args: ClaimsArgs) -> None:
    """The command `claims`."""
    chosen = choose(args.names)
    if args.data and args.measure is None:
        raise ValueError(f"--data {args.data[0]} is text to measure on: it goes with --measure")
    if args.measure is not None:
        measure(args.measure, args.data)
        if args.measure.resolve() != RESULTS:
            print(f"measured into {args.measure}; claims are judged by the files of {RESULTS}")
            return
    results = compute_all(chosen)
    if len(args.names) == 1 and args.names[0] in CLAIMS:
        print(explained(results[0]))
    else:
        if Console().is_terminal:
            print_on_terminal(results, Console(markup=False))
        else:
            print_table([row(result) for result in results], title="claims")
        print(summary(results))
    if args.json is not None:
        write_json(args.json, [record(result) for result in results])
    page = args.html or (None if args.names else PAGE)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, results)
        print(f"page     {page}")


def choose(names: Sequence[str]) -> list[Claim]:
    """The claims that the names mean, each once, in the order of the table."""
    wanted = set()
    for name in (name.replace("-", "_") for name in names):
        if name not in CLAIMS and name not in SUBJECTS:
            near = difflib.get_close_matches(name, [*CLAIMS, *SUBJECTS], n=1)
            fix = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"unknown claim {name!r}: {fix}`claims` alone lists all; subjects are "
                f"{', '.join(SUBJECTS)}"
            )
        wanted |= {claim.name for claim in SUBJECTS.get(name, ())} or {name}
    return [claim for claim in CLAIMS.values() if claim.name in wanted or not names]


def compute_all(chosen: Sequence[Claim]) -> list[Result]:
    """All results; a terminal sees which claim is being computed."""
    console = Console(stderr=True)
    if not (console.is_terminal and sys.stdout.isatty()):
        return [evaluate(claim) for claim in chosen]
    results = []
    with console.status("") as status:
        for claim in chosen:
            status.update(f"{len(results) + 1}/{len(chosen)} {claim.name}")
            results.append(evaluate(claim))
    return results


def print_on_terminal(results: Sequence[Result], console: Console) -> None:
    """Five columns that fit a terminal, names whole, one value a line."""
    table = Table(header_style="bold", show_lines=True)
    table.add_column("name", no_wrap=True)
    for name in ("claim", "printed", "ours"):
        table.add_column(name, overflow="fold")
    table.add_column("verdict", min_width=14)
    lines = lambda value: "\n".join(
        text({name: item}) for name, item in value.items() if item is not None
    ) if isinstance(value, Mapping) else text(value)  # fmt: skip
    for result in results:
        claim = result.claim
        style = "bold red" if result.verdict == DISAGREES else ""
        table.add_row(
            claim.name,
            f"{claim.says} ({claim.section})",
            lines(claim.printed),
            lines(result.ours),
            Text(f"{result.verdict}\n({claim.tolerance.words})", style),
        )
    console.print(table)


def row(result: Result) -> dict[str, Any]:
    """A row of the printed table."""
    claim = result.claim
    return {
        "name": claim.name,
        "section": claim.section,
        "claim": claim.says,
        "printed": text(claim.printed),
        "ours": text(result.ours),
        "tolerance": claim.tolerance.words,
        "verdict": result.verdict,
    }


def record(result: Result) -> dict[str, Any]:
    """A row of the JSON file, values as they are."""
    claim = result.claim
    return {
        "name": claim.name,
        "section": claim.section,
        "says": claim.says,
        "printed": claim.printed,
        "ours": result.ours,
        "tolerance": claim.tolerance.words,
        "verdict": result.verdict,
        "how": claim.how,
        "inputs": claim.inputs,
        "recorded": origin(claim),
    }


def origin(claim: Claim) -> dict[str, Any] | None:
    """Card, date and code of a recorded value, as far as its file says them."""
    if not claim.recorded or not (RESULTS / claim.recorded).is_file():
        return None
    found = json.loads((RESULTS / claim.recorded).read_text())
    said = found if isinstance(found, Mapping) else {}
    keys = ("card", "date", "commit", "machine", "time")
    return {"file": claim.recorded, **{key: said[key] for key in keys if key in said}}


def text(value: Any) -> str:
    """A value in a cell.

    >>> text({"FT2": 2, "FT3": 4.25})
    'FT2 2, FT3 4.25'
    """
    if isinstance(value, Mapping):
        shown = ((name, item) for name, item in value.items() if item is not None)
        return ", ".join(f"{name} {text(item)}" for name, item in shown)
    if isinstance(value, list | tuple):
        return " ".join(map(text, value))
    if isinstance(value, float) and 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return show(value)


def explained(result: Result) -> str:
    """A claim in words."""
    claim = result.claim
    lines = [
        f"{claim.name}: {claim.says} ({claim.section})",
        f"printed    {text(claim.printed)}",
        *([f"correct    {text(claim.correct)}"] if claim.verdict == WRONG else []),
        f"ours       {text(result.ours)}",
        f"tolerance  {claim.tolerance.words}",
        f"verdict    {result.verdict}",
        "",
        *textwrap.wrap(claim.how, 96),
    ]
    if claim.inputs:
        lines += ["", "inputs     " + ", ".join(f"{k}={show(v)}" for k, v in claim.inputs.items())]
    lines.append(f"computed by {where(claim)}")
    if claim.recorded:
        said = origin(claim) or {"file": f"{claim.recorded}, which `{claim.measured_by}` makes"}
        lines.append("recorded   " + ", ".join(str(value) for value in said.values() if value))
    if claim.otherwise and result.verdict not in (NOT_HERE, NOT_YET):
        ours = claim.compute(**{**claim.inputs, **claim.otherwise})
        changed = ", ".join(f"{name}={show(value)}" for name, value in claim.otherwise.items())
        lines += ["", f"With {changed}: {text(ours)}; {judge(claim, ours)}."]
    return "\n".join(lines)


def where(claim: Claim) -> str:
    """The function that computes a claim, and its file."""
    function = inspect.unwrap(claim.compute)
    return f"{function.__name__} in {Path(inspect.getsourcefile(function)).name}"


def summary(results: Sequence[Result]) -> str:
    """How many claims got which verdict."""
    counts: dict[str, int] = {}
    for result in results:
        counts[result.verdict] = counts.get(result.verdict, 0) + 1
    return "   ".join(f"{verdict}: {count}" for verdict, count in counts.items())
