"""Stop and go on: whatever stops a run, resuming it ends bit for bit like one left alone."""

import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from deepseek_jax.config import Schedule
from experiments import launch
from experiments.display import TrainingDisplay
from experiments.recipes import recipe
from experiments.run_directory import RunDirectory
from tests.experiments import runs

RESUME = ("launch", "--resume", "--run")


class Child:
    """The command line in a process of its own."""

    def __init__(self, words, folder, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments", *words],
            env=environment, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def wait_until(self, condition) -> bool:
        """False when the process ended first."""
        deadline = time.monotonic() + 300
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "the run hangs"
            time.sleep(0.001)
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        out, err = self.process.communicate(timeout=300)
        assert (self.process.returncode, err) == (0, ""), out


def lines_of(run) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(run) -> bool:
    """Whether a checkpoint is half written at this moment."""
    folder = run / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def kill_again_and_again(
    run, words, environment, *, times: int, last: int, draw: random.Random
) -> int:
    """Kills as many processes, every other one in a save; how many were in the middle of one."""
    in_a_save = 0
    for number in range(times):
        child = Child(words if number == 0 else [*RESUME, str(run)], run.parent, environment)
        # Not before this one has done something, and not all at the end.
        target = last * (number + 1) // (times + 1)
        child.wait_until(lambda target=target: lines_of(run) >= max(target, 1))
        if number % 2 == 0:
            child.wait_until(lambda: is_saving(run))
        time.sleep(draw.uniform(0, 0.1) if number % 2 else draw.uniform(0, 0.01))
        child.kill()
        in_a_save += is_saving(run)
    Child([*RESUME, str(run)], run.parent, environment).end()
    return in_a_save


def test_a_run_killed_twice_ends_like_one_left_alone(trained, compile_cache, tmp_path):
    run = tmp_path / "run"
    words = runs.launch_words(run, trained.data)
    in_a_save = kill_again_and_again(
        run, words, runs.child_environment(compile_cache), times=2, last=runs.STEPS,
        draw=random.Random(1),
    )
    assert in_a_save >= 1
    runs.assert_same_run(run, trained.run)
    # What was half written is gone.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "24"]


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_like_one_left_alone(trained, compile_cache, tmp_path):
    alone, run = tmp_path / "alone", tmp_path / "run"
    environment = runs.child_environment(compile_cache, optimized=True)
    Child(runs.launch_words(alone, trained.data, steps=96), tmp_path, environment).end()
    words = runs.launch_words(run, trained.data, steps=96)
    in_a_save = kill_again_and_again(
        run, words, environment, times=10, last=96, draw=random.Random()
    )
    assert in_a_save >= 3
    runs.assert_same_run(run, alone, steps=96)


@pytest.fixture
def signal_at(monkeypatch):
    """A function that has a signal sent to this process when a step is shown."""

    def at(step: int, signum: int) -> None:
        update = TrainingDisplay.update

        def updated(self, entry):
            update(self, entry)
            if entry["step"] == step:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(TrainingDisplay, "update", updated)

    return at


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_saves_and_says_how_to_go_on(
    trained, signal_at, monkeypatch, tmp_path, signum, code
):
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    signal_at(6, signum)
    run = tmp_path / "a run"
    monkeypatch.setattr(launch, "write_report_if_possible", lambda directory: None)
    stopped, out, err = runs.call(*runs.launch_words(run, trained.data))
    assert (stopped, err) == (code, "")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    # Step 7 was under way when step 6 was shown.
    said, command = out.splitlines()[-1].split("; go on with: ")
    assert said == "saved after step 7 of 24"
    assert not (run / "summary.json").exists()
    assert runs.metrics(run) == runs.metrics(trained.run)[:7]
    if signum == signal.SIGTERM:
        return  # what follows is the same for both
    monkeypatch.undo()
    monkeypatch.setattr(launch, "finish", lambda *args, **kwargs: None)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "experiments"]
    resumed, _, err = runs.call(*words[3:])
    assert (resumed, err) == (0, "")
    runs.assert_same_run(run, trained.run)


def test_a_finished_run_is_finished_again(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "summary.json").unlink()
    code, out, err = runs.call(*RESUME, run)
    assert (code, err) == (0, "")
    assert "all 24 steps are done" in out
    # The time it took to train included.
    assert (run / "summary.json").read_text() == (trained.run / "summary.json").read_text()
    assert runs.metrics(run) == runs.metrics(trained.run)


def test_an_interrupt_while_a_finished_run_is_scored_says_how_to_go_on(
    trained, monkeypatch, tmp_path
):
    run = shutil.copytree(trained.run, tmp_path / "run")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.launch.finish", interrupted)
    code, out, err = runs.call("launch", "--resume", "--run", run)
    assert (code, err) == (130, "interrupted\n")
    again = f"python -m experiments launch --run {run} --resume"
    assert f"all 24 steps are saved; score them with: {again}\n" in out


def test_a_run_goes_on_for_more_steps(trained, monkeypatch, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    monkeypatch.setattr(launch, "finish", lambda *args, **kwargs: None)
    code, _, err = runs.call(*RESUME, run, "--steps", 26)
    assert (code, err) == (0, "")
    assert runs.metrics(run)[:24] == runs.metrics(trained.run)
    # What was said of fewer steps no longer holds; the test leaves out what says it of these.
    assert not (run / "summary.json").exists()
    assert [entry["step"] for entry in runs.metrics(run)] == list(range(1, 27))
    # Both commands are needed to make this run again.
    command = runs.record(run)["command"]
    assert command == f"{runs.record(trained.run)['command']} && " + (
        f"python -m experiments launch --resume --run {run} --steps 26"
    )


def test_steps_beyond_a_schedule_that_ends_at_0_are_refused():
    run = recipe("tiny")(10)
    longer = dataclasses.replace(run, steps=20)
    with pytest.raises(ValueError, match="--steps 20 goes beyond .* 0 after 10 steps"):
        launch.check_rate(run, longer)
    launch.check_rate(run, run)
    constant = dataclasses.replace(longer, learning_rate=Schedule.constant(0.01))
    launch.check_rate(run, constant)


def test_sigterm_before_the_first_step_leaves_no_run(trained, compile_cache, tmp_path):
    run = tmp_path / "run"
    words = runs.launch_words(run, trained.data)
    child = Child(words, tmp_path, runs.child_environment(compile_cache)).process
    assert child.stdout.readline().startswith("preparing data")
    child.terminate()
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "interrupted\n")
    assert not (run / "config.json").exists() and not (run / ".lock").exists()


def test_an_unfinished_run_that_has_lost_its_checkpoints_does_not_begin_again(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    code, _, err = runs.call(*RESUME, run)
    assert code == 2 and "checkpoints holds no checkpoint of this run" in err
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("lost", ["checkpoints", "metrics.jsonl"])
def test_a_finished_run_without_what_it_goes_on_with_is_refused(trained, tmp_path, lost):
    run = shutil.copytree(trained.run, tmp_path / "run")
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, _, err = runs.call(*RESUME, run, "--steps", 26)
    assert code == 2 and lost in err and err.count("\n") == 1
    assert (run / "summary.json").exists()


def test_checkpoints_are_missed_by_the_interval_that_the_run_had(trained, tmp_path):
    run = RunDirectory(shutil.copytree(trained.run, tmp_path / "run"))
    run.summary.unlink()
    lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    most = 2 * run.read_run().checkpoint_every
    (run.path / "metrics.jsonl").write_text("".join(lines[:most]))
    run.check_resumable(None)
    (run.path / "metrics.jsonl").write_text("".join(lines[: most + 1]))
    with pytest.raises(ValueError, match="holds no checkpoint of this run"):
        run.check_resumable(None)


def test_resuming_needs_neither_the_text_nor_its_place(trained, monkeypatch, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "moved")
    # Tokens that the run was given, by a path from the folder that it was started in.
    tokens = (run / "data").rename(tmp_path / "tokens")
    record = runs.record(run) | {"shards": [str(tokens)]}
    (run / "config.json").write_text(json.dumps(record))
    for path in (run / "checkpoints").glob("24"):
        shutil.rmtree(path)
    monkeypatch.setattr(launch, "finish", lambda *args, **kwargs: None)
    hidden = trained.data.rename(trained.data.with_name("hidden"))
    try:
        code, _, err = runs.call(*RESUME, run)
    finally:
        hidden.rename(trained.data)
    assert (code, err) == (0, "")
    runs.assert_same_run(run, trained.run)
    assert runs.record(run)["command"] == runs.record(trained.run)["command"]
    assert runs.record(run)["shards"] == [str(tokens)]
