"""claims.html: the table of claims and the figures, one page without network or scripts."""

import html
from collections.abc import Sequence
from pathlib import Path

from experiments.claims.claim import DISAGREES, Result
from experiments.claims.figures import figures
from experiments.claims.table import SUBJECTS
from experiments.files import whole
from experiments.report import card, section
from experiments.report_style import CSS
from experiments.tables import show

STYLE = """
.claims { overflow-x: auto; }
.claims table { font-size: 0.85rem; min-width: 52rem; }
.claims th, .claims td { width: auto; padding: 0.35rem 0.9rem 0.35rem 0; }
.claims tr + tr td { border-top: 1px solid var(--grid); }
.claims tr:not(.more) td:first-child { white-space: nowrap; }
.claims tr.more td { border-top: 0; padding-top: 0; }
.claims td.value { white-space: nowrap; font-variant-numeric: tabular-nums; }
.claims .bad { color: var(--second); font-weight: 600; }
"""


def write_page(path: Path, results: Sequence[Result]) -> None:
    """Write the page so that it is whole or absent."""
    with whole(path) as partial:
        partial.write_text(page(results), encoding="utf-8")


def page(results: Sequence[Result]) -> str:
    """The whole page."""
    by_name = {result.claim.name: result for result in results}
    title = "The paper's claims"
    cards = "".join(card(*figure) for figure in figures(by_name))
    tables = "".join(
        section(subject.capitalize(), rows([by_name[c.name] for c in chosen if c.name in by_name]))
        for subject, chosen in SUBJECTS.items()
        if any(claim.name in by_name for claim in chosen)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{CSS}{STYLE}</style></head><body><main>"
        f"<header><h1>{title}</h1><p>Tables and figures of \"Insights into DeepSeek-V3\", computed "
        "again by the code that trains, and what was printed beside it.</p></header>"
        f'{counts(results)}<div class="cards">{cards}</div>{tables}</main></body></html>\n'
    )


def counts(results: Sequence[Result]) -> str:
    """How many claims got which verdict."""
    verdicts = [result.verdict for result in results]
    cells = "".join(
        f"<div><dt>{html.escape(verdict)}</dt><dd>{verdicts.count(verdict)}</dd></div>"
        for verdict in dict.fromkeys(verdicts)
    )
    return f'<dl class="facts">{cells}</dl>'


def rows(results: Sequence[Result]) -> str:
    """The claims of a subject, a line for each value of a claim."""
    names = ("", "claim", "", "printed", "ours", "tolerance", "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="claims"><table><tr>{head}</tr>{"".join(map(lines, results))}</table></div>'
    )


def lines(result: Result) -> str:
    """A claim; what is said of all its values stands beside the first of them."""
    claim, (first, *more) = result.claim, parts(result)
    over = f' rowspan="{1 + len(more)}"' if more else ""
    bad = " class=bad" if result.verdict == DISAGREES else ""
    lined = (
        f'<tr title="{html.escape(claim.how, quote=True)}">'
        f"<td{over}>{claim.name}<br><small>{html.escape(claim.section)}</small></td>"
        f"<td{over}>{html.escape(claim.says)}</td>{first}"
        f"<td{over}>{html.escape(claim.tolerance.words)}</td>"
        f"<td{over}{bad}>{result.verdict}</td></tr>"
    )
    return lined + "".join(f'<tr class="more">{part}</tr>' for part in more)


def parts(result: Result) -> list[str]:
    """Three cells for each value: its name, as printed, ours."""
    printed, ours = result.claim.printed, result.ours
    if not isinstance(printed, dict):
        printed, ours = {"": printed}, {"": ours}
    ours = ours or {}
    names = [*printed, *(name for name in ours if name not in printed)]
    value = lambda of, name: f'<td class="value">{cell(of.get(name))}</td>'
    return [
        f"<td>{html.escape(name)}</td>{value(printed, name)}{value(ours, name)}" for name in names
    ]


def cell(value) -> str:
    """A value in a cell."""
    if isinstance(value, list | tuple):
        return " ".join(map(cell, value))
    return html.escape(f"{value:.6g}" if isinstance(value, float) else show(value))
