"""The report of a run: what is on the page, and runs that did not end well."""

import html.parser
import json
import re

import numpy as np
import pytest

from experiments import command_line, plots
from experiments.__main__ import COMMANDS
from experiments.plots import Curve
from experiments.report import write_report

NUM_LAYERS, NUM_EXPERTS = 3, 4
CONFIG = {
    "recipe": "tiny",
    "command": ["python", "-m", "experiments", "launch", "tiny", "--run", "a & b"],
    "run": {
        "config": {"num_dense_layers": 1, "num_mtp": 1, "vocab_size": 1024, "yarn": None},
        "steps": 60,
        "learning_rate": {"phases": [{"start": 0.0, "end": 0.003}]},
    },
    "corpus": {"hash": "a3f09c21"},
    "parameters": {"total": 1_350_000, "active": 912_000},
    "devices": ["cpu"],
}
SUMMARY = {
    "val_bits_per_byte": 1.592,
    "gzip_bits_per_byte": 1.95,
    "xz_bits_per_byte": 1.69,
    "val_bytes": 512_000,
    "train_seconds": 140.2,
    "sample": {"prompt": "def f(", "text": "x) -> <b>:"},
}


def metrics(step: int) -> dict:
    load = np.ones((NUM_LAYERS, NUM_EXPERTS))
    load[:, 0] = 2.0
    return {
        "step": step,
        "tokens": 2048 * step,
        "loss": 3 + 4 / step,
        "mtp_loss": 4 + 4 / step,
        "bits_per_byte": 1.5 + 2 / step,
        "grad_norm": 1.0 / step,
        "learning_rate": 1e-3,
        "busiest_over_mean": 2.0,
        "expert_load_LE": load.tolist(),
        "skipped": 0,
        "seconds": 0.2,
        "tokens_per_second": 10_240.0,
        "mfu_causal": None,
        "mfu_full": None,
    }


def make_run(folder, lines=(), *, config=None, summary=None):
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(html.parser.HTMLParser):
    """A page as a browser takes it apart: tags must close in order, nothing may load."""

    VOID = {"meta", "br", "path", "use", "image"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.links = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.links += [
            value for name, value in attributes if name.split(":")[-1] in ("src", "href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path) -> tuple[str, str]:
    """The source of a page and what one reads on it."""
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    loads = [link for link in page.links if not link.startswith(("#", "data:image/png;base64"))]
    assert not loads and "<script" not in source and "@import" not in source
    return source, " ".join(" ".join(page.text).split())


def test_a_finished_run_shows_all_its_figures(tmp_path):
    run = make_run(tmp_path, [metrics(step) for step in range(1, 61)], summary=SUMMARY)
    path = write_report(run)
    assert path == tmp_path / "report.html"
    source, text = read(path)
    for part in (
        "Finished: 60 steps, 123 k tokens in 2m20s.",
        "1.592",
        "1.690",
        "1.950",
        "next token",
        "Gradient norm",
        "Throughput",
        "Busiest expert",
        "Layer 2",
        "Layer 3",
        "MTP module 1",
        "python -m experiments launch tiny --run 'a & b'",
        "vocab_size 1,024",
        "1.35 M",
    ):
        assert part in text, f"{part} is not in {text}"
    assert "<mark>def f(</mark>x) -&gt; &lt;b&gt;:" in source
    # Loss, bits per byte, gradient norm, learning rate, throughput, busiest expert, three layers.
    assert source.count("<svg") == 6 + NUM_LAYERS
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "summary.json"


def test_figures_take_their_colours_from_the_page(tmp_path):
    source, _ = read(write_report(make_run(tmp_path, map(metrics, range(1, 9)))))
    style, figures = source.split("</style>", 1)
    assert "prefers-color-scheme: dark" in style
    assert {f"--{name}" for name in plots.VARIABLES.values()} <= set(re.findall(r"--\w+", style))
    assert not re.findall(r"#0[0-9]0[0-9]0[0-9]|#[0-9a-f]{6}\b", figures)


def test_an_interrupted_run_says_how_far_it_came(tmp_path):
    run = make_run(tmp_path, [metrics(step) for step in range(1, 13)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 3.')
    _, text = read(write_report(run))
    assert "Not finished: step 12 of 60, 24.6 k tokens, 2s so far." in text
    assert "gzip" not in text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_of_hardly_any_steps_has_a_report(tmp_path, steps):
    _, text = read(write_report(make_run(tmp_path, map(metrics, range(1, steps + 1)))))
    assert ("No step has been recorded yet." in text) == (steps == 0)


def test_a_run_without_any_metrics_file_has_a_report(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    read(write_report(tmp_path))


def test_values_that_are_unknown_or_not_finite_are_left_out(tmp_path):
    lines = [metrics(step) for step in range(1, 21)]
    lines[4] |= {"loss": None, "grad_norm": float("nan")}
    for line in lines[4:]:
        line["skipped"] = 1  # so far
    lines[7] |= {"loss": float("inf")}
    for line in lines:
        line |= {"mtp_loss": None, "tokens_per_second": None, "expert_load_LE": None}
    source, text = read(write_report(make_run(tmp_path, lines)))
    assert "nan" not in text.lower() and "MTP" not in text and "Throughput" not in text
    assert "Expert load" not in text and re.search(r"steps skipped\s*1\b", text)


def test_a_step_recorded_again_after_a_resume_counts_once(tmp_path):
    lines = [metrics(step) for step in (1, 2, 3, 4, 3, 4, 5)]
    _, text = read(write_report(make_run(tmp_path, lines)))
    assert "step 5 of 60" in text and "1s so far" in text


def test_a_long_run_with_many_layers_has_a_short_report(tmp_path):
    lines = [metrics(step) for step in range(1, 3001)]
    for line in lines:
        line["expert_load_LE"] = [[1.0, 1.0]] * 58
    path = write_report(make_run(tmp_path, lines))
    _, text = read(path)
    assert "8 of 58 layers are shown." in text
    assert path.stat().st_size < 1_000_000


def test_the_command_writes_the_report_of_a_run(tmp_path, capsys):
    make_run(tmp_path, [metrics(1)])
    assert command_line.run(COMMANDS, ["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_the_command_refuses_a_folder_that_is_no_run(tmp_path, capsys):
    assert command_line.run(COMMANDS, ["report", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no config.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_smoothing_keeps_a_line_and_skips_what_is_not_finite():
    line = np.arange(100.0)
    np.testing.assert_allclose(plots.smooth(line, 5)[:95], line[:95])
    line[40] = np.nan
    assert np.isfinite(plots.smooth(line, 5)).all()
    assert plots.smooth(np.array([np.nan, 1.0]), 0).tolist()[1] == 1.0


def test_a_long_curve_is_thinned_to_means():
    steps = np.arange(10_000)
    x, y = plots.thinned(steps, np.where(steps % 7 == 0, np.nan, 2.0 * steps))
    assert len(x) == plots.POINTS
    np.testing.assert_allclose(y, 2 * x)


def test_colours_deepen_with_the_distance_from_the_mean():
    rgba = plots.colours(np.array([0.0, 0.5, 1.0, 1.5, 2.0, 9.0, np.nan]))
    assert rgba[:, 3].tolist() == [255, 128, 0, 128, 255, 255, 0]
    assert tuple(rgba[1, :3]) == plots.BELOW and tuple(rgba[4, :3]) == plots.ABOVE


def test_equal_figures_are_equal_text():
    draw = lambda: plots.curves([1, 2, 3], [Curve("a", [1.0, 2.0, 3.0])])
    assert draw() == draw()
