"""Places of the processes of a program: which one this is, who starts it, where all meet."""

import contextlib
import itertools
import os
import re
import socket
from dataclasses import dataclass

# Set by the parent for its processes: "index/count@host:port host0,host1,...".
PROCESS = "DEEPSEEK_JAX_PROCESS"
# Set by whoever starts hosts: "host:port" of the first one, and how many there are.
COORDINATOR, COUNT = "DEEPSEEK_JAX_COORDINATOR", "DEEPSEEK_JAX_PROCESSES"
PORT = 20000  # of a job's coordinator; jobs of Slurm, which may share a host, have two ports each


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
        port = PORT + 2 * (int(variables.get("SLURM_JOB_ID", 0)) % 10000)
        return [Place(int(variables["SLURM_PROCID"]), count, f"{hosts[0]}:{port}", tuple(hosts))]
    if int(variables.get(COUNT, 1)) > 1:
        count = int(variables[COUNT])
        missing = {COORDINATOR, "JOB_COMPLETION_INDEX"} - set(variables)
        if missing:
            raise ValueError(f"{COUNT}={count} also needs {' and '.join(sorted(missing))}")
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


def meeting_port(port: int) -> int:
    """Where processes meet before there is a coordinator at `port`."""
    return port + 1


def free_port() -> int:
    """A port for a coordinator: the one to meet at is free too."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError):
                two.bind(("127.0.0.1", meeting_port(port)))
                return port
