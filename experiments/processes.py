"""Several processes as one program: how they meet, what they agree on, and how a host ends them.

On each host a small parent starts the processes, says in one line which of them was lost, and
stops the others: a survivor dies inside the runtime, where no `except` runs.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments.command_line import TRACEBACK

# Set by the parent for its processes: "index/count@host:port host0,host1,...".
PROCESS = "DEEPSEEK_JAX_PROCESS"
# Set by whoever starts hosts: "host:port" of the first one, and how many there are.
COORDINATOR, COUNT = "DEEPSEEK_JAX_COORDINATOR", "DEEPSEEK_JAX_PROCESSES"
HEARTBEAT = 20  # seconds without a sign of life after which a process counts as lost
# Seconds that processes have to meet, where a minute is not right.
ARRIVAL = "DEEPSEEK_JAX_ARRIVAL"
KNOCK = 5  # seconds in which one that has come says who it is
GRACE = 10  # seconds that a process has to end by itself


@dataclass(frozen=True)
class Place:
    """Which process of a group this is, and where the group meets."""

    index: int
    count: int
    coordinator: str
    hosts: tuple[str, ...]  # of each process

    def __str__(self) -> str:
        return f"{self.index}/{self.count}@{self.coordinator} {','.join(self.hosts)}"

    @classmethod
    def read(cls, text: str) -> "Place":
        index, count, coordinator, hosts = re.fullmatch(r"(\d+)/(\d+)@(\S+) (\S+)", text).groups()
        return cls(int(index), int(count), coordinator, tuple(hosts.split(",")))

    def name(self, index: int) -> str:
        return f"process {index} of {self.count} on {self.hosts[index]}"

    def of(self, index: int) -> "Place":
        return Place(index, self.count, self.coordinator, self.hosts)


def here() -> Place | None:
    """The place that a parent gave this process."""
    text = os.environ.get(PROCESS)
    return Place.read(text) if text else None


def group(processes: int | None) -> list[Place]:
    """The places of the processes that this host is to start; none for a program of one process.

    With a number all are here. Otherwise a batch system may have started this command on several
    hosts: Slurm by srun, or anything that sets DEEPSEEK_JAX_COORDINATOR, DEEPSEEK_JAX_PROCESSES
    and JOB_COMPLETION_INDEX; each host then runs one.
    """
    if processes is not None:
        if processes < 1:
            raise ValueError(f"--processes {processes} must be at least 1")
        most = max(8, os.cpu_count() or 1)
        if processes > most:
            raise ValueError(f"--processes {processes} are more than this machine can run: at most "
                             f"{most}")  # fmt: skip
        first = Place(0, processes, f"127.0.0.1:{free_port()}", ("this-host",) * processes)
        return [first.of(index) for index in range(processes)] if processes > 1 else []
    variables = os.environ
    if int(variables.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        hosts = slurm_hosts(variables["SLURM_STEP_NODELIST"])
        count = int(variables["SLURM_STEP_NUM_TASKS"])
        if len(hosts) != count:
            raise ValueError(f"srun started {count} tasks on {len(hosts)} nodes: use one a node")
        port = 20000 + int(variables.get("SLURM_JOB_ID", 0)) % 20000
        return [Place(int(variables["SLURM_PROCID"]), count, f"{hosts[0]}:{port}", tuple(hosts))]
    if int(variables.get(COUNT, 1)) > 1:
        count = int(variables[COUNT])
        index = int(variables["JOB_COMPLETION_INDEX"])
        pods = tuple(f"host-{n}" for n in range(count))
        return [Place(index, count, variables[COORDINATOR], pods)]
    return []


def slurm_hosts(text: str) -> list[str]:
    """Host names from Slurm's short form.

    >>> slurm_hosts("a[01-03,7],b,r[1-2]n[1-2]-ib")
    ['a01', 'a02', 'a03', 'a7', 'b', 'r1n1-ib', 'r1n2-ib', 'r2n1-ib', 'r2n2-ib']
    """
    hosts = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        # Names and ranges in turn.
        parts = [[part] for part in re.split(r"\[|\]", name)]
        parts[1::2] = [numbers_of(ranges) for (ranges,) in parts[1::2]]
        hosts += map("".join, itertools.product(*parts))
    return hosts


def numbers_of(ranges: str) -> list[str]:
    """Numbers of a list of ranges, as wide as the first of each is written.

    >>> numbers_of("08-10,7")
    ['08', '09', '10', '7']
    """
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        numbers += [f"{number:0{len(first)}}" for number in span]
    return numbers


def free_port() -> int:
    """A port of which the next one is free too."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError):
                two.bind(("127.0.0.1", port + 1))
                return port


# The parent.


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
        """Whether it ended, and not because it was asked to; early on SIGTERM still kills it."""
        fine = (None, 0, 128 + signal.SIGTERM, *[-signal.SIGTERM] * bool(asked))
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


def lost_elsewhere(child: Child) -> str:
    """Which process of another host brought this one down, as far as its runtime says."""
    place, text = child.place, "\n".join(child.errors)
    unhealthy = re.search(r"stopped sending heartbeats\):\n([\d, \n]+)", text)
    tasks = [int(n) for n in re.findall(r"\d+", unhealthy[1])] if unhealthy else []
    if tasks and max(tasks) < place.count:
        return f"{' and '.join(map(place.name, tasks))} no longer answers"
    return f"{place.name(place.index)} was stopped because another process no longer answers"


# The processes.


def join(place: Place) -> None:
    """Meets the other processes and makes one program of all; prints the table of devices.

    Raises:
      ValueError: a process did not arrive; it is named.
    """
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    names = meet(place)
    jax.distributed.initialize(
        place.coordinator,
        num_processes=place.count,
        process_id=place.index,
        heartbeat_timeout_seconds=HEARTBEAT,
        initialization_timeout=arrival(),
    )
    if place.index == 0:
        for index, name in enumerate(names):
            own = [d for d in jax.devices() if d.process_index == index]
            print(f"process {index}  {name}  {len(own)} x {own[0].device_kind}", flush=True)


def end_with(parent: int) -> None:
    """Ends this process as SIGTERM does when its parent is gone, which can then stop nothing."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def arrival() -> int:
    """Seconds that processes have to meet."""
    return int(os.environ.get(ARRIVAL, 60))


def meet(place: Place, seconds: float | None = None) -> list[str]:
    """Waits for all processes and returns the names of their hosts."""
    seconds = arrival() if seconds is None else seconds
    host, _, port = place.coordinator.rpartition(":")
    own = f"{socket.gethostname()} (pid {os.getpid()})"
    deadline = time.monotonic() + seconds
    if place.index == 0:
        return _receive(place, int(port) + 1, own, seconds)
    while True:
        try:
            with socket.create_connection((host, int(port) + 1), timeout=2) as link:
                link.sendall(json.dumps([place.index, own]).encode() + b"\n")
                link.settimeout(seconds + GRACE)
                with link.makefile() as lines:
                    answer = json.loads(lines.readline() or '"the first process ended"')
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{place.name(0)} does not answer at {place.coordinator} within "
                    f"{seconds:g} s: start it, or open the port"
                ) from error
            time.sleep(0.2)
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def _receive(place: Place, port: int, own: str, seconds: float) -> list[str]:
    names, links, deadline = {0: own}, [], time.monotonic() + seconds
    with contextlib.closing(socket.create_server(("", port))) as server:
        while len(names) < place.count and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            # Whoever else knocks, says nothing or says something else is not one of ours.
            with contextlib.suppress(OSError, ValueError, TypeError, IndexError):
                link, _ = server.accept()
                try:
                    link.settimeout(KNOCK)
                    with link.makefile() as lines:
                        index, name = json.loads(lines.readline())
                    names[range(place.count)[index]] = name
                except BaseException:
                    link.close()
                    raise
                links.append(link)
        missing = [place.name(n) for n in range(place.count) if n not in names]
        answer = f"{', '.join(missing)} did not arrive within {seconds:g} s: start all again"
        answer = answer if missing else [names[n] for n in range(place.count)]
        for link in links:
            with contextlib.suppress(OSError), link:
                link.sendall(json.dumps(answer).encode() + b"\n")
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def texts(text: str) -> list[str]:
    """A text of each process, on all of them."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).reshape(-1)
    padded = np.pad(data, (0, int(sizes.max()) - len(data)))
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def asked_to_stop(step: int) -> bool:
    """Whether all processes are to stop after this step, because one of them was told to."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[bool]:
    """The first process goes through the block, then the others; yields whether it is the first."""
    if not is_first():
        wait_for_all(what)
    yield is_first()
    if is_first():
        wait_for_all(what)
