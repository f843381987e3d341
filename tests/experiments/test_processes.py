"""Processes that meet, agree, are lost by name and resume; batch scripts and manifests."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from experiments import processes
from experiments.processes import Place
from tests.experiments import runs


def places(count, hosts=None):
    first = Place(0, count, f"127.0.0.1:{processes.free_port()}", hosts or ("here",) * count)
    return [first.of(index) for index in range(count)]


def test_a_place_survives_the_environment():
    place = Place(2, 4, "node01:20001", ("node01", "node02", "node03", "node04"))
    assert Place.read(str(place)) == place
    assert place.name(3) == "process 3 of 4 on node04"


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("a1", ["a1"]),
        ("n[01-03,07],m", ["n01", "n02", "n03", "n07", "m"]),
        ("gpu-[8-10]", ["gpu-8", "gpu-9", "gpu-10"]),
        ("r[1-2]n[1,3],s[2]-ib", ["r1n1", "r1n3", "r2n1", "r2n3", "s2-ib"]),
    ],
)
def test_slurms_short_form_names_every_host(text, hosts):
    assert processes.slurm_hosts(text) == hosts


def test_a_host_of_a_slurm_job_starts_its_own_process(monkeypatch):
    for name, value in (("STEP_NUM_TASKS", "3"), ("STEP_NODELIST", "n[1-3]"), ("PROCID", "2"),
                        ("JOB_ID", "40007")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes.group(None) == [Place(2, 3, "n1:20007", ("n1", "n2", "n3"))]
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n1")
    with pytest.raises(ValueError, match="srun started 3 tasks on 1 nodes: use one a node"):
        processes.group(None)


def test_a_pod_of_a_job_set_starts_its_own_process(monkeypatch):
    monkeypatch.setenv(processes.COORDINATOR, "job-hosts-0-0.job:20000")
    monkeypatch.setenv(processes.COUNT, "2")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    (place,) = processes.group(None)
    assert (place.index, place.count, place.coordinator) == (1, 2, "job-hosts-0-0.job:20000")


def test_one_process_needs_no_others(monkeypatch):
    assert processes.group(None) == processes.group(1) == []
    with pytest.raises(ValueError, match="--processes 0 must be at least 1"):
        processes.group(0)
    with pytest.raises(ValueError, match="--processes 1000 are more than this machine"):
        processes.group(1000)
    assert [place.index for place in processes.group(3)] == [0, 1, 2]


def test_a_process_whose_parent_is_gone_ends_as_by_sigterm(monkeypatch):
    parents, sent = iter([7, 7, 1]), []
    monkeypatch.setattr(processes.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(processes.os, "kill", lambda *words: sent.append(words))
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    processes.end_with(7)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_signal_while_processes_are_started_leaves_none_of_them(monkeypatch):
    made = []

    class Started:
        code = 143

        def __init__(self, place, *_, **__):
            self.place, self.process = place, self
            made.append(self)
            if place.index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        send_signal = end = failed = lambda self, *_: None

    monkeypatch.setattr(processes, "Child", Started)
    assert processes.supervise(processes.group(4), []) == 143
    assert len(made) == 2


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
    found = meeting(places(3), 20)
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


def test_who_does_not_arrive_is_named_to_all():
    group = places(4, ("a", "b", "c", "d"))
    found = meeting([group[0], group[1], group[3]], 1.5)
    assert set(found.values()) == {
        "process 2 of 4 on c did not arrive within 1.5 s: start all again"
    }
    lonely = meeting([places(2, ("a", "b"))[1]], 0.5)
    assert "process 0 of 2 on a does not answer at 127.0.0.1" in lonely[1]


def test_a_stranger_who_knocks_changes_nothing():
    group = places(2)
    port = int(group[0].coordinator.rpartition(":")[2]) + 1
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


CHILD = """
import os, sys, time
index = int(os.environ["DEEPSEEK_JAX_PROCESS"][0])
print("hello from", index, flush=True)
{}
time.sleep(60)
"""


def supervised(group, code):
    return processes.supervise(group, ["-c", CHILD.format(code)])


def test_a_killed_process_is_named_and_the_others_are_stopped(capfd):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"process 1 of 3 on here \(pid \d+\) was lost: SIGKILL"):
        supervised(places(3), "if index == 1: os.kill(os.getpid(), 9)\nif index == 2: os.abort()")
    assert time.monotonic() - began < 20
    assert capfd.readouterr().out == "hello from 0\n"


def test_an_error_of_a_process_is_the_error_of_all():
    with pytest.raises(ValueError, match="^no such file; all are stopped"):
        supervised(places(2), "sys.exit('error: no such file') if index else None")


def test_a_process_lost_on_another_host_is_named_as_far_as_the_runtime_says():
    text = "tasks are unhealthy (stopped sending heartbeats):\n3\nThe tasks have crashed."
    code = f"print({text!r}, file=sys.stderr, flush=True); os.abort()"
    place = Place(1, 4, "a:1", ("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="process 3 of 4 on d no longer answers"):
        supervised([place], code)


@pytest.mark.parametrize(
    "visible, count, cards",
    [(None, 2, ["0,1", "2,3"]), (None, 4, ["0", "1", "2", "3"]), ("5,7", 2, ["5", "7"]),
     (None, 1, [None]), ("", 2, [None, None])],
    ids=["half-each", "one-each", "of-those-visible", "all", "none-visible"],
)  # fmt: skip
def test_each_process_of_a_host_has_gpus_of_its_own(visible, count, cards, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(processes, "gpus", lambda: ["0", "1", "2", "3"])
    assert [own.get("CUDA_VISIBLE_DEVICES") for own in processes.shares(count)] == cards


def test_gpus_that_do_not_divide_are_refused_unless_nobody_asks_for_them(monkeypatch):
    monkeypatch.setattr(processes, "gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ValueError, match="--processes 3 must divide the 4 GPUs of this host"):
        processes.shares(3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert processes.shares(3) == [{}, {}, {}]


def test_what_a_process_is_given_reaches_it(monkeypatch, capfd):
    monkeypatch.setattr(processes, "shares", lambda count: [{"OWN": "a"}, {"OWN": "b"}])
    supervised(places(2), "assert os.environ['OWN'] == 'ab'[index]; sys.exit()")
    assert capfd.readouterr().out == "hello from 0\n"


def test_processes_that_end_well_end_the_program():
    assert supervised(places(2), "sys.exit(0)") == 0


# Batch systems.


def test_the_batch_script_holds_the_command_without_what_submits_it():
    words = ("launch", "tiny", "--submit", "slurm", "--nodes=4", "--devices-per-node", "8",
             "--dry-run", "--mesh", "fsdp=4,expert=8", "--set", "seq_len=64", "micro_batch=32",
             "batch_size=32")
    code, out, err = runs.call(*words)
    assert (code, err) == (0, "")
    assert "#SBATCH --nodes=4\n" in out and "#SBATCH --gpus-per-node=8\n" in out
    assert out.splitlines()[-1] == (
        "srun --kill-on-bad-exit=1 python -m experiments launch tiny --devices-per-node 8 "
        "--mesh fsdp=4,expert=8 --set seq_len=64 micro_batch=32 batch_size=32"
    )
    # It is a script that a shell can read.
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_the_manifest_gives_each_pod_what_its_process_needs():
    code, out, err = runs.call("launch", "tiny", "--submit", "k8s", "--nodes", "2", "--image",
                               "registry/it's:1", "--dry-run")
    assert (code, err) == (0, "")
    for line in ("kind: JobSet", "parallelism: 2", "completions: 2", "image: 'registry/it''s:1'",
                 "- 'launch'"):
        assert f" {line}\n" in out or out.startswith(line) or f"\n{line}\n" in out, line
    # Each set has a name of its own, and the first pod is found by it.
    (name,) = re.findall(r"^  name: (deepseek-jax-\d{8}-\d{6})$", out, re.MULTILINE)
    assert f'value: "{name}-hosts-0-0.{name}:20000"\n' in out
    code, out, _ = runs.call("launch", "tiny", "--submit", "k8s", "--image", "a", "--volume",
                             "claim=/shared", "--devices-per-node", "8", "--dry-run")
    for line in ("mountPath: '/shared'", "claimName: 'claim'", "nvidia.com/gpu: 8",
                 "- name: DEEPSEEK_JAX_ARRIVAL"):
        assert code == 0 and f" {line}\n" in out, line
    assert "--volume" not in out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--submit k8s", "--submit k8s needs --image"),
        ("--submit k8s --image a --volume claim", "--volume 'claim' must be CLAIM=PATH"),
        ("--submit k8s --image a --volume claim=/shared --run /else/where",
         "--run /else/where must lie below /shared"),
        ("tiiny --submit slurm", "unknown recipe 'tiiny'"),
        ("tiny --submit slurm --mesh fsdp=32 --nodes 4 --devices-per-node 8",
         "splits a batch over 32 devices, which must divide micro_batch=8"),
        ("tiny --submit slurm --mesh expert=8 --nodes 2 --devices-per-node 3",
         "mesh expert=8 makes 8 devices, the cluster has 6"),
    ],
)
def test_what_no_host_would_run_is_not_submitted(words, message):
    code, out, err = runs.call("launch", *words.split(), "--dry-run")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


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
    group, started = places(2), []
    for place, steps in zip(group, (3, 4), strict=True):
        words = runs.launch_words(tmp_path / "run", text, "--mesh", "expert=8", settings=IMPOSED,
                                  steps=steps)
        started.append(subprocess.Popen(
            [sys.executable, "-m", "experiments", *words], cwd=runs.ROOT,
            env={**environment(4), processes.PROCESS: str(place)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ))
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2
        assert "processes 0 and 1 have different configurations (steps: 3 -> 4; " in err
