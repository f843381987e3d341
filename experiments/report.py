"""report.html of a run: one page without network or scripts, for any screen, light or dark."""

import html
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import plots
from experiments.display import duration
from experiments.files import whole
from experiments.plots import FIRST, SECOND, Curve, short
from experiments.records import Records, read_records
from experiments.report_style import CSS

# Heat maps are drawn for at most this many layers.
LAYERS = 8


@dataclass(frozen=True)
class Report:
    """Write report.html of a run again from what the run has recorded, finished or not."""

    run: tyro.conf.Positional[Path]
    """The folder of the run."""


def report(arguments: Report) -> None:
    """The command `report`."""
    print(write_report(arguments.run))


def write_report(run_dir: Path) -> Path:
    """Write report.html beside the run's records and return its path."""
    path = Path(run_dir) / "report.html"
    with whole(path) as partial:
        partial.write_text(page(read_records(Path(run_dir))), encoding="utf-8")
    return path


def page(records: Records) -> str:
    """The whole page."""
    title = html.escape(str(records.config.get("recipe", "a run")))
    body = "".join(
        (
            f"<header><h1>{title}</h1><p>{html.escape(state(records))}</p></header>",
            facts(records),
            compression(records),
            f'<div class="cards">{"".join(figures(records))}</div>' if records.steps else "",
            experts(records),
            sample(records),
            command(records),
            configuration(records),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def state(records: Records) -> str:
    """One sentence: how far the run has come."""
    planned = records.config.get("run", {}).get("steps")
    if not records.steps:
        return "No step has been recorded yet."
    done, tokens = records.steps[-1], records.last("tokens")
    seconds = (records.summary or {}).get("train_seconds") or np.nansum(records.scalars["seconds"])
    size = f", {short(tokens)} tokens" if tokens is not None else ""
    if records.summary is not None:
        return f"Finished: {done:,} steps{size} in {duration(seconds)}."
    return f"Not finished: step {done:,} of {planned or '?'}{size}, {duration(seconds)} so far."


def facts(records: Records) -> str:
    """The figures one looks for first."""
    parameters, summary = records.config.get("parameters", {}), records.summary or {}
    validation = summary.get("val_bits_per_byte")
    known = [
        ("bits per byte, validation", validation, "{:.3f}"),
        ("bits per byte, training", records.last("bits_per_byte", 50), "{:.3f}"),
        ("loss, nats per token", records.last("loss", 50), "{:.3f}"),
        ("MTP loss", records.last("mtp_loss", 50), "{:.3f}"),
        ("tokens per second", median(records.scalars["tokens_per_second"]), "{:,.0f}"),
        ("model FLOP utilisation", median(100 * records.scalars["mfu_causal"]), "{:.1f} %"),
        ("busiest expert over mean", records.last("busiest_over_mean", 100), "{:.2f}"),
        ("parameters", parameters.get("total"), None),
        ("active per token", parameters.get("active"), None),
        ("steps skipped", records.last("skipped") or None, "{:.0f}"),
    ]
    cells = [
        f"<div><dt>{name}</dt><dd>{form.format(value) if form else short(value)}</dd></div>"
        for name, value, form in known
        if value is not None
    ]
    return f'<dl class="facts">{"".join(cells)}</dl>'


def median(values: np.ndarray) -> float | None:
    """The median of the known values."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def compression(records: Records) -> str:
    """Validation bits per byte beside what gzip and xz need for the same bytes."""
    if records.summary is None:
        return ""
    bars = [
        (name, records.summary[key], kind)
        for name, key, kind in (
            ("this model", "val_bits_per_byte", "ours"),
            ("xz -9", "xz_bits_per_byte", "theirs"),
            ("gzip -9", "gzip_bits_per_byte", "theirs"),
        )
        if records.summary.get(key) is not None
    ]
    if not bars:
        return ""
    longest = max(value for _, value, _ in bars)
    rows = "".join(
        f'<div class="bar {kind}"><span>{name}</span>'
        f'<i style="width:{100 * value / longest:.1f}%"></i><b>{value:.3f}</b></div>'
        for name, value, kind in bars
    )
    size = records.summary.get("val_bytes")
    what = f"the same {size:,} bytes of validation text" if size else "the same text"
    return card(
        "Validation bits per byte", f"What it takes to write down {what}; less is better.", rows
    )


def figures(records: Records) -> Iterator[str]:
    """The curves of the run, each in its card."""
    s, steps = records.scalars, records.steps
    losses = [Curve("next token", s["loss"])]
    if np.isfinite(s["mtp_loss"]).any():
        losses.append(Curve("MTP", s["mtp_loss"], SECOND))
    several = "Next token, and tokens beyond it (MTP)" if len(losses) > 1 else "Next token"
    yield card("Loss", f"{several}, in nats per token.", plots.curves(steps, losses))
    for title, words, name, options in (
        ("Bits per byte", "Estimated on the training text.", "bits_per_byte", {}),
        ("Gradient norm", "Before clipping; log scale.", "grad_norm", {"log": True}),
        ("Learning rate", "", "learning_rate", {"smoothed": False, "zero": True}),
        ("Throughput", "Tokens per second.", "tokens_per_second", {"zero": True}),
    ):
        if np.isfinite(s[name]).any():
            yield card(title, words, plots.curves(steps, [Curve("", s[name], FIRST)], **options))
    if np.isfinite(s["busiest_over_mean"]).any():
        words = "Load of the busiest expert over the mean of its layer; 1 is perfect balance."
        line = plots.curves(steps, [Curve("", s["busiest_over_mean"], SECOND)])
        yield card("Busiest expert", words, line)


def experts(records: Records) -> str:
    """One heat map of expert load for each MoE layer, or for layers evenly spread over many."""
    num_layers = len(records.load_LET)
    if num_layers == 0:
        return ""
    shown = sorted({round(i) for i in np.linspace(0, num_layers - 1, min(num_layers, LAYERS))})
    names = layer_names(records.config, num_layers)
    maps = "".join(
        card(names[i], "", plots.heat_map(records.load_LET[i], records.load_steps, "expert"))
        for i in shown
    )
    some = f" {len(shown)} of {num_layers} layers are shown." if len(shown) < num_layers else ""
    return (
        "<section><h2>Expert load</h2>"
        "<p>Tokens that each expert receives, over the mean of its layer. "
        f"Where the map is blank, the load is even.{some}</p>"
        '<div class="scale"><span>none</span><i></i><span>twice the mean or more</span></div>'
        f'<div class="cards">{maps}</div></section>'
    )


def layer_names(config: Mapping[str, Any], num_layers: int) -> list[str]:
    """Names of the layers that have experts: MoE layers by their place in the model, then MTP."""
    sizes = config.get("run", {}).get("config", {})
    first, num_mtp = sizes.get("num_dense_layers", 0), sizes.get("num_mtp", 0)
    main = [f"Layer {first + i + 1}" for i in range(num_layers - num_mtp)]
    return main + [f"MTP module {k + 1}" for k in range(num_mtp)]


def sample(records: Records) -> str:
    """Text that the trained model wrote."""
    written = (records.summary or {}).get("sample")
    if not written:
        return ""
    prompt, text = html.escape(written.get("prompt", "")), html.escape(written.get("text", ""))
    return section("A sample", f"<pre><mark>{prompt}</mark>{text}</pre>")


def command(records: Records) -> str:
    """What to type to get this run again."""
    typed = records.config.get("command")
    if not typed:
        return ""
    line = typed if isinstance(typed, str) else shlex.join(map(str, typed))
    return section("Command", f'<pre class="command">{html.escape(line)}</pre>')


def configuration(records: Records) -> str:
    """Everything in config.json, one folded table for each group of settings."""
    tables = []
    for name, rows in groups(records.config):
        cells = "".join(
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(words(value))}</td></tr>"
            for key, value in rows
        )
        tables.append(
            f"<details><summary>{html.escape(name)}</summary><table>{cells}</table></details>"
        )
    return section("Configuration", "".join(tables))


def groups(config: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, list]]:
    """Nested settings as flat groups: first a group's own values, then the groups inside it."""
    own = [
        (key, value)
        for key, value in config.items()
        if not isinstance(value, Mapping) and (name or key != "command")
    ]
    if own:
        yield name or "recipe", own
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from groups(value, f"{name}.{key}" if name else key)


def words(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:,.10g}"
    if isinstance(value, list):
        return "; ".join(map(words, value)) or "none"
    return str(value)


def section(title: str, body: str) -> str:
    """A part of the page under its title."""
    return f"<section><h2>{title}</h2>{body}</section>"


def card(title: str, caption: str, body: str) -> str:
    """A figure with a title above it and, if it needs one, a sentence."""
    text = f"<p>{html.escape(caption)}</p>" if caption else ""
    return f'<figure class="card"><figcaption><h3>{title}</h3>{text}</figcaption>{body}</figure>'
