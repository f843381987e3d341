"""A host's processes: started, watched, named when they are lost."""

import io
import os
import signal
import threading
import time

import pytest

from experiments import supervision
from experiments.hosts import Place, group
from tests.experiments.groups import group_of


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

    monkeypatch.setattr(supervision, "Child", Started)
    assert supervision.supervise(group(4), []) == 143
    assert len(made) == 2


def test_a_process_whose_parent_is_gone_ends_as_by_sigterm(monkeypatch):
    parents, sent = iter([7, 7, 1]), []
    monkeypatch.setattr(supervision.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(supervision.os, "kill", lambda *words: sent.append(words))
    monkeypatch.setattr(supervision.time, "sleep", lambda seconds: None)
    supervision.end_with(7)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_second_signal_kills_and_is_no_loss(monkeypatch, capfd):
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
    sent = iter([0.5, 0.5])

    def interrupt():
        while "deaf" not in said.getvalue():
            time.sleep(0.05)
        for seconds in sent:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(seconds)

    said = io.StringIO()
    monkeypatch.setattr(supervision.sys, "stdout", said)
    threading.Thread(target=interrupt).start()
    assert supervised(group_of(2), f"import signal; {code}") == 130
    assert said.getvalue().endswith("stopped at once; a run that has begun goes on with --resume\n")


CHILD = """
import os, sys, time
index = int(os.environ["DEEPSEEK_JAX_PROCESS"][0])
print("hello from", index, flush=True)
{}
time.sleep(60)
"""


def supervised(group, code):
    return supervision.supervise(group, ["-c", CHILD.format(code)])


def test_a_killed_process_is_named_and_the_others_are_stopped(capfd):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"process 1 of 3 on here \(pid \d+\) was lost: SIGKILL"):
        supervised(group_of(3), "if index == 1: os.kill(os.getpid(), 9)\nif index == 2: os.abort()")
    assert time.monotonic() - began < 20
    assert capfd.readouterr().out == "hello from 0\n"


def test_an_error_of_a_process_is_the_error_of_all():
    with pytest.raises(ValueError, match="^no such file; all are stopped"):
        supervised(group_of(2), "sys.exit('error: no such file') if index else None")


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
    monkeypatch.setattr(supervision, "gpus", lambda: ["0", "1", "2", "3"])
    assert [own.get("CUDA_VISIBLE_DEVICES") for own in supervision.shares(count)] == cards


def test_gpus_that_do_not_divide_are_refused_unless_nobody_asks_for_them(monkeypatch):
    monkeypatch.setattr(supervision, "gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ValueError, match="--processes 3 must divide the 4 GPUs of this host"):
        supervision.shares(3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert supervision.shares(3) == [{}, {}, {}]


def test_what_a_process_is_given_reaches_it(monkeypatch, capfd):
    monkeypatch.setattr(supervision, "shares", lambda count: [{"OWN": "a"}, {"OWN": "b"}])
    supervised(group_of(2), "assert os.environ['OWN'] == 'ab'[index]; sys.exit()")
    assert capfd.readouterr().out == "hello from 0\n"


def test_processes_that_end_well_end_the_program():
    assert supervised(group_of(2), "sys.exit(0)") == 0
