"""Figures of the page of claims: what the paper prints beside what we compute."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments import plots
from experiments.claims import network
from experiments.claims.claim import Result
from experiments.plots import FIRST, MUTED, SECOND, short


def figures(results: Mapping[str, Result]) -> Iterator[tuple[str, str, str]]:
    """Title, sentence and SVG of each figure whose claims were computed."""
    for name, title, unit in (
        ("kv_cache", "Table 1: KV cache of a token", "KB in BF16."),
        ("table_4_parts", "Table 4: a step", "Seconds; ours is the sum of the printed parts."),
        ("figure_7", "Figure 7: DeepEP on planes",
         "GB/s as DeepEP counts them, 4096 tokens a GPU; ours is modelled."),
        ("figure_8_rate", "Figure 8: routing of rings on RoCE",
         "GB/s, by tensor parallelism; printed values are read off a chart, ours are modelled."),
    ):  # fmt: skip
        if name in results:
            result = results[name]
            pair = {"printed": result.claim.printed, "ours": result.ours}
            yield title, unit, bars(list(result.ours), pair)
    if {"training_flops", "training_flops_one_rule"} <= set(results):
        yield (
            "Table 2: GFLOP of a training token",
            "As printed, and by one rule for all four models.",
            table_2(results["training_flops"], results["training_flops_one_rule"]),
        )
    if "table_3_cost" in results:
        result = results["table_3_cost"]
        names = [name for name in result.ours if name.endswith("endpoint")]
        pair = {"printed": result.claim.printed, "ours": result.ours}
        yield (
            "Table 3: cost of an endpoint",
            "Thousands of dollars; ours with two fitted prices.",
            bars(names, pair, [name.split()[0] for name in names]),
        )
    if "figure_5" in results:
        yield (
            "Figure 5: all-to-all on 32, 64 and 128 GPUs",
            "GB/s over the bytes of a GPU, modelled; planes lie on rails.",
            rates_over_size(),
        )
    if "figure_6" in results:
        yield (
            "Figure 6: all-to-all on 16 GPUs",
            "Microseconds over the bytes of a GPU, modelled; planes lie on rails.",
            seconds_over_size(),
        )


def table_2(moe: Result, dense: Result) -> str:
    """All four models."""
    printed = moe.claim.printed | dense.claim.printed
    return bars(list(printed), {"printed": printed, "one rule": moe.ours | dense.ours})


def bars(
    names: Sequence[str],
    series: Mapping[str, Mapping[str, float]],
    labels: Sequence[str] | None = None,
) -> str:
    """Pairs of bars with their values at the end, the printed one pale."""
    figure, axes = plots.new_figure(height=0.6 + 0.42 * len(names))
    place = np.arange(len(names))
    for offset, (label, values), colour in zip(
        (-0.2, 0.2), series.items(), (MUTED, FIRST), strict=True
    ):
        lengths = [float(values[name]) for name in names]
        axes.barh(place + offset, lengths, 0.36, color=colour, label=label)
        for y, length in zip(place + offset, lengths, strict=True):
            axes.text(length, y, f" {short(length)}", va="center", color=MUTED, fontsize=9)
    axes.set_yticks(place, labels or names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.grid(False)
    axes.grid(axis="x", visible=False)
    axes.set_xticks([])
    axes.set_xlabel("")
    axes.spines["bottom"].set_visible(False)
    axes.legend(
        frameon=False, labelcolor="linecolor", loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
        handlelength=1.2, borderpad=0,
    )  # fmt: skip
    return plots.svg(figure)


def rates_over_size() -> str:
    """Figure 5 on both networks."""
    figure, axes = plots.new_figure()
    for gpus in network.GPUS:
        both = [network.planes_and_rails(gpus, size) for size in network.SIZES]
        for index, (colour, style) in enumerate(((FIRST, "-"), (SECOND, ":"))):
            rates = [timings[index].rate / 1e9 for timings in both]
            name = ("planes", "rails")[index] if gpus == network.GPUS[0] else None
            axes.plot(network.SIZES, rates, style, color=colour, linewidth=2, label=name)
        axes.text(network.SIZES[0], rates[0] + 1, f"{gpus} GPUs", color=MUTED, fontsize=9)
    axes.set_ylim(0, 70)
    _sizes(axes)
    axes.legend(frameon=False, labelcolor="linecolor", loc="lower right", handlelength=1.5)
    return plots.svg(figure)


def seconds_over_size() -> str:
    """Figure 6 on both networks."""
    figure, axes = plots.new_figure()
    both = [network.planes_and_rails(16, size) for size in network.SMALL_SIZES]
    for index, (name, colour, style) in enumerate(
        (("planes", FIRST, "-"), ("rails", SECOND, ":"))
    ):
        micro = [1e6 * timings[index].seconds for timings in both]
        axes.plot(network.SMALL_SIZES, micro, style, color=colour, linewidth=2, label=name)
    axes.set_yscale("log")
    _sizes(axes)
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper left", handlelength=1.5)
    return plots.svg(figure)


def _sizes(axes) -> None:
    """A logarithmic x axis of bytes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: binary(x)))
    axes.set_xlabel("bytes of a GPU", color=MUTED)


def binary(size: float) -> str:
    """A size in powers of 1024.

    >>> binary(64), binary(2**30)
    ('64 B', '1 GiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size:.3g} B"
