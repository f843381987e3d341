"""Processes that meet, agree, are lost by name and resume."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from experiments import processes
from experiments.hosts import PROCESS, meeting_port
from tests.experiments import runs
from tests.experiments.groups import group_of


def meeting(group, seconds):
    """What each of some processes learns when they meet."""
    found = {}

    def one(place):
        try:
            found[place.index] = processes.meet(place, seconds)
        except ValueError as error:
            found[place.index] = str(error)

    threads = [threading.Thread(target=one, args=(place,)) for place in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_learn_who_is_there():
    found = meeting(group_of(3), 20)
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


def test_who_does_not_arrive_is_named_to_all():
    group = group_of(4, ("a", "b", "c", "d"))
    found = meeting([group[0], group[1], group[3]], 1.5)
    assert set(found.values()) == {
        "process 2 of 4 on c did not arrive within 1.5 s: start all again"
    }
    lonely = meeting([group_of(2, ("a", "b"))[1]], 0.5)
    assert "process 0 of 2 on a does not answer at 127.0.0.1" in lonely[1]


def test_a_stranger_who_knocks_changes_nothing():
    group = group_of(2)
    port = meeting_port(int(group[0].coordinator.rpartition(":")[2]))
    silent = []

    def knock():
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[7, 3]\n", None):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    link = socket.create_connection(("127.0.0.1", port), timeout=1)
                    silent.append(link)
                    if said is not None:
                        link.sendall(said)
                        link.close()
                    break

    first = threading.Thread(target=lambda: found.update(meeting(group[:1], 30)))
    found = {}
    first.start()
    knock()
    found.update(meeting(group[1:], 30))
    first.join()
    for link in silent:
        link.close()
    assert len(silent) == 4 and found[0] == found[1] and len(found[0]) == 2


# Whole runs, in processes of their own.

SETTINGS = ("micro_batch=8", "batch_size=8", "config.experts_per_token=4")
# Every token chooses all experts.
IMPOSED = (*SETTINGS[:2], "config.experts_per_token=8", "config.num_groups=1",
           "config.groups_per_token=1")


def environment(devices):
    return {**os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def start(words, devices):
    return subprocess.Popen([sys.executable, "-m", "experiments", *words], cwd=runs.ROOT,
                            env=environment(devices), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def launched(run, data, count, mesh, *more, settings=SETTINGS, steps=20):
    """The metrics of a run in `count` processes of 8 devices in all."""
    words = runs.launch_words(run, data, "--mesh", mesh, "--processes", str(count), *more,
                              settings=settings, steps=steps)
    process = start(words, 8 // count)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return runs.metrics(run)


def compare(actual, expected):
    """Losses agree closely up to the first step with another choice, and well after it."""
    first = next((a["step"] for a, b in zip(actual, expected, strict=True)
                  if a["expert_load_LE"] != b["expert_load_LE"]), len(actual) + 1)
    print(f"first step with another choice of experts: {first}")
    for a, b in zip(actual, expected, strict=True):
        tolerance = 1e-5 if a["step"] < first else 1e-3
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=tolerance, err_msg=str(a["step"]))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [IMPOSED, SETTINGS], ids=["imposed", "free"])
def test_processes_give_the_losses_of_one(tmp_path, text, settings):
    mesh = "fsdp=2,expert=4"
    one = launched(tmp_path / "one", text, 1, mesh, settings=settings)
    for count in (2, 4):
        many = launched(tmp_path / str(count), text, count, mesh, settings=settings)
        compare(many, one)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_goes_on_in_one_and_in_two_on_other_meshes(tmp_path, text):
    expected = launched(tmp_path / "one", text, 1, "expert=8", settings=IMPOSED, steps=8)
    for count, mesh in ((1, "data=2,expert=4"), (2, "fsdp=4,tensor=2")):
        run = tmp_path / f"to-{count}"
        launched(run, text, 4, "expert=8", settings=IMPOSED, steps=4)
        process = start(["launch", "--run", str(run), "--resume", "--steps", "8", "--mesh", mesh,
                         "--processes", str(count)], 8 // count)
        _, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        compare(runs.metrics(run), expected)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_within_a_minute_and_it_resumes(tmp_path, text):
    run = tmp_path / "run"
    words = runs.launch_words(run, text, "--mesh", "expert=8", "--processes", "4",
                              settings=IMPOSED, steps=100_000)
    process = start(words, 2)
    complete = lambda: sorted(int(p.name) for p in (run / "checkpoints").glob("[0-9]*")
                              if p.name.isdigit())
    while not complete():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    victim = int(children.stdout.split()[2])
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 60 and process.returncode == 2
    assert err.startswith(f"error: process 2 of 4 on this-host (pid {victim}) was lost: SIGKILL")
    assert err.count("\n") == 1
    last = complete()[-1]
    resumed = start(["launch", "--run", str(run), "--resume", "--steps", str(last + 2), "--mesh",
                     "expert=8", "--processes", "4"], 2)
    _, err = resumed.communicate(timeout=1200)
    assert resumed.returncode == 0, err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, last + 3))


@pytest.mark.slow
def test_ctrl_c_saves_the_same_step_in_all_processes(tmp_path, text):
    run = tmp_path / "run"
    words = runs.launch_words(run, text, "--mesh", "expert=8", "--processes", "2",
                              settings=(*IMPOSED, "checkpoint_every=100000"), steps=100_000)
    process = start(words, 4)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    (saved,) = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    assert f"saved after step {saved} of 100000; go on with: " in out
    assert len(metrics.read_text().splitlines()) == saved


@pytest.mark.slow
def test_hosts_with_different_configurations_are_refused_by_the_field(tmp_path, text):
    group, started = group_of(2), []
    for place, steps in zip(group, (3, 4), strict=True):
        words = runs.launch_words(tmp_path / "run", text, "--mesh", "expert=8", settings=IMPOSED,
                                  steps=steps)
        started.append(subprocess.Popen(
            [sys.executable, "-m", "experiments", *words], cwd=runs.ROOT,
            env={**environment(4), PROCESS: str(place)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ))
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2
        assert "processes 0 and 1 have different configurations (steps: 3 -> 4; " in err
