"""The small parent of a host's processes: starts them, says which was lost, stops the others.

It is needed because a survivor dies inside the runtime, where no `except` runs.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.command_line import TRACEBACK
from experiments.hosts import PROCESS, Place

GRACE = 10  # seconds that a process has to end by itself after a signal


class Child:
    """A process of this host; what it prints comes here."""

    def __init__(
        self, place: Place, words: Sequence[str], *, shown: bool, cards: Mapping[str, str]
    ):
        self.place, self.shown = place, shown
        self.errors: deque[str] = deque(maxlen=200)
        self.process = subprocess.Popen(
            [sys.executable, *words], env={**os.environ, **cards, PROCESS: str(place)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            # Ctrl-C reaches the parent alone, which tells the processes.
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=self._read, args=(stream, keep), daemon=True)
            for stream, keep in ((self.process.stdout, None), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, keep) -> None:
        with stream:
            for line in stream:
                if keep is not None:
                    keep.append(line.rstrip())
                elif self.shown and not line.startswith("[Gloo]"):
                    sys.stdout.write(line)
                    sys.stdout.flush()

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def failed(self, asked: Sequence[int]) -> bool:
        """Whether it ended, and not because it was asked to; early on SIGTERM still kills it.

        A second signal does so at any time.
        """
        fine = (None, 0, 128 + signal.SIGTERM, *[-signal.SIGTERM] * bool(asked),
                *[-signal.SIGKILL] * (len(asked) > 1))
        return self.code not in fine

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(timeout=5)

    def reason(self) -> str | None:
        """Why it ended, in one line; None for a process that others brought down."""
        said = [line for line in self.errors if line.startswith("error: ")]
        if said:
            return said[0].removeprefix("error: ")
        if self.code == -signal.SIGABRT:
            return None
        how = f"code {self.code}"
        if self.code < 0:
            how = signal.Signals(-self.code).name
        last = next((line for line in reversed(self.errors) if line.strip()), "")
        return f"{self.place.name(self.place.index)} (pid {self.process.pid}) was lost: {how}" + (
            f", {last[:200]} ({TRACEBACK}=1 shows all)" if last and self.code > 0 else ""
        )


def shares(processes: int) -> list[dict[str, str]]:
    """What tells each process of this host which GPUs are its own; nothing where there are none.

    Raises:
      ValueError: the GPUs do not divide.
    """
    nothing: list[dict[str, str]] = [{} for _ in range(processes)]
    if processes == 1 or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return nothing
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = visible.split(",") if visible else gpus() if visible is None else []
    if not cards:
        return nothing
    if len(cards) % processes:
        raise ValueError(
            f"--processes {processes} must divide the {len(cards)} GPUs of this host; "
            "JAX_PLATFORMS=cpu leaves them alone"
        )
    each = len(cards) // processes
    return [{"CUDA_VISIBLE_DEVICES": ",".join(cards[i * each : (i + 1) * each])}
            for i in range(processes)]


def gpus() -> list[str]:
    """The numbers of this host's GPUs."""
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def supervise(places: Sequence[Place], words: Sequence[str]) -> int:
    """Runs this host's processes of a program to their end and returns its exit code.

    Raises:
      ValueError: a process was lost, or ended with an error; the others are stopped by then.
    """
    started = zip(places, shares(len(places)), strict=True)
    children: list[Child] = []
    asked: list[int] = []

    def forward(signum, frame):
        asked.append(signum)
        if len(asked) == 1 and children:
            print("stopping after the running step, or when what goes before or after training is "
                  "done; a second signal stops at once", flush=True)  # fmt: skip
        if len(asked) == 2:
            print("stopped at once; a run that has begun goes on with --resume", flush=True)
        for child in children:
            # The runtime lets all processes stop after the same step on SIGTERM.
            child.process.send_signal(signal.SIGKILL if len(asked) > 1 else signal.SIGTERM)

    # Before the first is started, or a signal would leave it without a parent.
    before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for place, cards in started:
            if not asked:
                children.append(Child(place, words, shown=place.index == 0, cards=cards))
        while any(child.code is None for child in children):
            failed = [c for c in children if c.failed(asked)]
            if failed:
                time.sleep(1.0)  # for the one that was lost to be seen beside those it brings down
                break
            time.sleep(0.1)
        failed = [c for c in children if c.failed(asked)]
        if not failed:
            codes = [child.code for child in children]
            return 128 + asked[0] if asked and any(codes) else max(codes)
        reasons = [reason for reason in (c.reason() for c in failed) if reason]
        if os.environ.get(TRACEBACK):
            for line in failed[0].errors:
                print(line, file=sys.stderr)
        raise ValueError(f"{(reasons or [lost_elsewhere(failed[0])])[0]}; all are stopped, a "
                         "run that has begun goes on with --resume")
    finally:
        deadline = time.monotonic() + GRACE
        while any(c.code is None for c in children) and time.monotonic() < deadline and asked:
            time.sleep(0.1)
        for child in children:
            child.end()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_with_parent() -> None:
    """Has this process, a child, end as by SIGTERM when its parent, which could end it, is gone."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def lost_elsewhere(child: Child) -> str:
    """Which process of another host brought this one down, as far as its runtime says."""
    place, text = child.place, "\n".join(child.errors)
    unhealthy = re.search(r"stopped sending heartbeats\):\n([\d, \n]+)", text)
    tasks = [int(n) for n in re.findall(r"\d+", unhealthy[1])] if unhealthy else []
    if tasks and max(tasks) < place.count:
        return f"{' and '.join(map(place.name, tasks))} no longer answers"
    return f"{place.name(place.index)} was stopped because another process no longer answers"
