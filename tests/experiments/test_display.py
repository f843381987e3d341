"""What a run shows while it trains."""

import io
import math

import pytest
from rich.console import Console

from experiments.display import TrainingDisplay, duration, sparkline

STEP = {
    "loss": 3.21,
    "mtp_loss": 4.5,
    "bits_per_byte": 1.59,
    "tokens_per_second": 11_400.0,
    "mfu_causal": None,
    "grad_norm": 0.8,
    "busiest_over_mean": 1.22,
    "learning_rate": 3e-3,
    "skipped": 0,
    "expert_load_LE": [[1.0, 1.0]],
}


class Clock:
    """Seconds that pass only when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def display(steps=100, *, terminal=False, width=100):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width)
    return TrainingDisplay(steps, console=console, clock=Clock(), interval=10.0), file


def test_without_a_terminal_there_is_one_line_each_interval_and_at_both_ends():
    shown, file = display()
    shown.start([("recipe", "tiny"), ("parameters", "1,350,000 [total]")])
    for step in range(1, 101):
        shown.clock.now += 1.0
        shown.update({"step": step, **STEP})
    shown.stop()
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["recipe      tiny", "parameters  1,350,000 [total]"]
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines[2:]]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[3] == (
        "step 11/100  loss 3.210  MTP loss 4.500  bits/byte 1.590  tokens/s 11,400  "
        "gradient norm 0.80  busiest expert 1.22x  learning rate 3.00e-03  left 1m29s"
    )


@pytest.mark.parametrize("width", [50, 120])
def test_a_terminal_shows_one_panel_with_all_figures(width):
    shown, file = display(terminal=True, width=width)
    with shown:
        shown.start([("recipe", "tiny")])
        for step in (1, 2, 3):
            shown.clock.now += 2.0
            shown.update({"step": step, **STEP, "mfu_causal": 0.421, "skipped": 1})
        shown.say("saved at step 3")
    text = file.getvalue()
    for part in ("recipe", "3.210", "11,400", "42.1%", "1.22", "skipped", "saved at step 3"):
        assert part in text, text
    assert "3m14s left" in text


def test_before_the_first_step_the_panel_says_that_it_compiles():
    shown, file = display(terminal=True)
    with shown:
        shown.start()
    assert "compiling" in file.getvalue()


def test_time_left_follows_the_recent_pace_and_counts_from_a_resumed_step():
    shown, _ = display(1000)
    assert shown.time_left() is None
    for step in range(501, 601):
        shown.clock.now += 9.0 if step < 540 else 2.0
        shown.update({"step": step, **STEP})
    assert shown.time_left() == pytest.approx(800.0)


def test_a_loss_that_is_not_finite_does_not_break_the_display():
    shown, file = display(terminal=True)
    with shown:
        shown.start()
        for step, loss in enumerate((math.nan, None, 2.0, math.inf), 1):
            shown.update({"step": step, **STEP, "loss": loss})
    assert "nan" not in file.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.2, "8s"), (200, "3m20s"), (7500, "2h05m"), (None, "?")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sparkline_falls_with_the_loss_and_fits_the_width():
    line = sparkline([float(x) for x in range(100, 0, -1)], 20)
    assert len(line) == 20 and line[0] == "\u2588" and line[-1] == "\u2581"
    assert sorted(line, reverse=True) == list(line)
    assert sparkline([1.0, 1.0], 80) == "\u2581\u2581"
    assert sparkline([], 80) == ""
