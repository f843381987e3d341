"""Several processes as one program: how they meet, tell each other texts, wait and stop."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator

import jax
import numpy as np

from experiments.hosts import Place, meeting_port
from experiments.supervision import end_with_parent

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as lost
# Seconds that processes have to meet, where a minute is not right.
ARRIVAL = "DEEPSEEK_JAX_ARRIVAL"
KNOCK = 5  # seconds in which one that has come says who it is
LISTENING = 10  # seconds that the first process has to answer once all should have come


def join(place: Place) -> None:
    """Meets the other processes and makes one program of all; prints the table of devices.

    Raises:
      ValueError: a process did not arrive; it is named.
    """
    end_with_parent()
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


def arrival() -> int:
    """Seconds that processes have to meet."""
    return int(os.environ.get(ARRIVAL, 60))


def meet(place: Place, seconds: float | None = None) -> list[str]:
    """Waits for all processes and returns the names of their hosts."""
    seconds = arrival() if seconds is None else seconds
    host, _, port = place.coordinator.rpartition(":")
    port = meeting_port(int(port))
    own = f"{socket.gethostname()} (pid {os.getpid()})"
    deadline = time.monotonic() + seconds
    if place.index == 0:
        return _receive(place, port, own, seconds)
    while True:
        try:
            with socket.create_connection((host, port), timeout=2) as link:
                link.sendall(json.dumps([place.index, own]).encode() + b"\n")
                link.settimeout(seconds + LISTENING)
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
