"""Pipeline schedules: what each rank does in which order, simulated with chunk times.

1F1B, ZB1P (zero bubble with 1F1B's memory), DualPipe and DualPipeV (V3 report, section 3.2.1 and
table 2, and the public schedules). A chunk is one micro-batch on one stage. Its forward takes F;
its backward takes B, of which W is the weights' part, which can also run later by itself; DualPipe
runs a forward and a backward of different micro-batches as one pair that takes F&B.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Part(NamedTuple):
    """A chunk's forward, whole backward, backward to its inputs alone, or weights' part."""

    what: Literal["forward", "backward", "input", "weight"]
    direction: int  # 1 for the micro-batches that enter DualPipe at the last rank
    stage: int
    micro_batch: int


Task = tuple[Part, ...]  # one part, or a forward and a backward that overlap


@dataclass(frozen=True)
class Times:
    """Seconds, or any other unit, of a chunk; `hop` passes between ranks before work goes on."""

    forward: float = 1.0
    backward: float = 2.0  # with the weights' part
    weight: float = 1.0
    pair: float = 3.0  # a forward and a backward that overlap
    hop: float = 0.0

    def __post_init__(self):
        for name in ("forward", "backward", "weight", "pair"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.hop < math.inf:
            raise ValueError(f"hop={self.hop} must be finite and not negative")
        if self.weight >= self.backward:
            raise ValueError(
                f"weight={self.weight} is a part of backward={self.backward}, so less than it"
            )

    def of(self, task: Task) -> float:
        """The time of a task."""
        if len(task) == 2:
            return self.pair
        return {
            "forward": self.forward,
            "backward": self.backward,
            "input": self.backward - self.weight,
            "weight": self.weight,
        }[task[0].what]


class Span(NamedTuple):
    """A task and when a rank is busy with it."""

    task: Task
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every rank does when."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        return max(span.end for rank in self.spans for span in rank)

    @property
    def bubbles(self) -> list[float]:
        """Idle time of each rank until the last one is done."""
        return [self.seconds - sum(s.end - s.start for s in rank) for rank in self.spans]

    @property
    def held(self) -> list[int]:
        """The most chunks of each rank whose activations wait for their backward at a time."""
        most = []
        for rank in self.spans:
            now = peak = 0
            for span in rank:
                now += sum(part.what == "forward" for part in span.task)
                peak = max(peak, now)
                now -= sum(part.what in ("backward", "input") for part in span.task)
            most.append(peak)
        return most


def one_f_one_b(ranks: int, micro_batches: int) -> list[list[Task]]:
    """As many forwards as ranks follow, then one forward and one backward in turn."""
    _check(ranks, micro_batches, least=ranks)
    schedule = []
    for rank in range(ranks):
        ahead = ranks - rank - 1
        tasks = [(Part("forward", 0, rank, i),) for i in range(ahead)]
        for i in range(micro_batches):
            if i + ahead < micro_batches:
                tasks.append((Part("forward", 0, rank, i + ahead),))
            tasks.append((Part("backward", 0, rank, i),))
        schedule.append(tasks)
    return schedule


def zb1p(ranks: int, micro_batches: int) -> list[list[Task]]:
    """1F1B whose weights' parts lag behind by a rank's number, filling what was idle."""
    _check(ranks, micro_batches, least=ranks)
    schedule = []
    for rank in range(ranks):
        ahead = ranks - rank - 1
        tasks = [(Part("forward", 0, rank, i),) for i in range(ahead)]
        for i in range(micro_batches):
            if i + ahead < micro_batches:
                tasks.append((Part("forward", 0, rank, i + ahead),))
            tasks.append((Part("input", 0, rank, i),))
            if i >= rank:
                tasks.append((Part("weight", 0, rank, i - rank),))
        tasks += [(Part("weight", 0, rank, i),) for i in range(micro_batches - rank, micro_batches)]
        schedule.append(tasks)
    return schedule


def dualpipe(ranks: int, micro_batches: int) -> list[list[Task]]:
    """Half of the micro-batches from either end, forwards of one half over backwards of the other.

    A rank holds two stages, its own and its mirror image's.
    """
    if ranks % 2 or micro_batches % 2:
        raise ValueError(f"DualPipe needs even {ranks=} and {micro_batches=}")
    _check(ranks, micro_batches, least=2 * ranks)
    schedule = []
    for rank in range(ranks):
        mirrored = rank >= ranks // 2
        place = min(rank, ranks - 1 - rank)
        # Of a mirrored rank the near direction is the second.
        near = (int(mirrored), place)
        far = (1 - int(mirrored), ranks - 1 - place)
        schedule.append(_two_way(near, far, ranks // 2, place, micro_batches // 2))
    return schedule


def dualpipe_v(ranks: int, micro_batches: int) -> list[list[Task]]:
    """DualPipe folded in the middle: every micro-batch goes down the ranks and up again.

    2 x ranks stages on `ranks` devices, each with one of either leg.
    """
    _check(ranks, micro_batches, least=2 * ranks)
    return [
        _two_way((0, rank), (0, 2 * ranks - 1 - rank), ranks, rank, micro_batches)
        for rank in range(ranks)
    ]


def _two_way(near, far, half: int, place: int, count: int) -> list[Task]:
    """Tasks of a rank with chunks of a near and a far stage, `count` micro-batches each."""
    tasks: list[Task] = []
    done: dict = {}
    waiting: list[Part] = []  # inputs' backwards whose weights' part is still to come

    def part(what, leg):
        number = done.setdefault((what == "forward", leg), 0)
        done[what == "forward", leg] += 1
        return Part(what, *leg, number)

    def forward(leg):
        tasks.append((part("forward", leg),))

    def backward(leg, later=False):
        tasks.append((part("input" if later else "backward", leg),))
        if later:
            waiting.append(tasks[-1][0])

    def weight():
        tasks.append((waiting.pop(0)._replace(what="weight"),))

    def pair(one, other):
        tasks.append((part("forward", one), part("backward", other)))

    for _ in range(2 * (half - place - 1)):
        forward(near)
    for _ in range(place + 1):
        forward(near)
        forward(far)
    for _ in range(half - place - 1):
        backward(far, later=True)
        weight()
        forward(far)
    for i in range(count - 2 * half + place + 1):
        if i == 0 and place == half - 1:
            # The micro-batch whose backward is due has only just been here.
            forward(near)
            backward(far)
        else:
            pair(near, far)
        pair(far, near)
    for _ in range(half - place - 1):
        backward(far)
        pair(far, near)
    # From the middle of this phase on, weights' parts wait, to fill what comes after.
    later = False
    for i in range(place + 1):
        turn = i == (place + 1) // 2
        later = later or (turn and place % 2 == 1)
        backward(far, later)
        later = later or (turn and place % 2 == 0)
        backward(near, later)
    for _ in range(half - place - 1):
        weight()
        backward(near, later=True)
    while waiting:
        weight()
    return tasks


SCHEDULES: dict[str, Callable[[int, int], list[list[Task]]]] = {
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipe_v": dualpipe_v,
}


def simulate(schedule: Sequence[Sequence[Task]], times: Times) -> Timeline:
    """Runs every rank's tasks in their order, each as soon as what it needs is there.

    Raises:
      ValueError: ranks that wait for each other.
    """
    last = max(part.stage for rank in schedule for task in rank for part in task)
    home = {(p.direction, p.stage): r for r, rank in enumerate(schedule) for t in rank for p in t}
    ready: dict[Part, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule]
    left = sum(map(len, schedule))
    while left:
        before = left
        for rank, tasks in enumerate(schedule):
            while len(spans[rank]) < len(tasks):
                task = tasks[len(spans[rank])]
                start = spans[rank][-1].end if spans[rank] else 0.0
                needs = [need for part in task for need in _needs(part, last)]
                if not all(need in ready for need in needs):
                    break
                for need in needs:
                    away = home[need.direction, need.stage] != rank
                    start = max(start, ready[need] + times.hop * away)
                spans[rank].append(Span(task, start, start + times.of(task)))
                for part in task:
                    what = "backward" if part.what == "input" else part.what
                    ready[part._replace(what=what)] = spans[rank][-1].end
                left -= 1
        if left == before:
            raise ValueError("the ranks of this schedule wait for each other")
    return Timeline(tuple(map(tuple, spans)))


def _needs(part: Part, last: int) -> list[Part]:
    """Parts that must be done before this one."""
    if part.what == "forward":
        return [part._replace(stage=part.stage - 1)] if part.stage else []
    if part.what == "weight":
        return [part._replace(what="backward")]
    needs = [part._replace(what="forward")]
    if part.stage < last:
        needs.append(part._replace(what="backward", stage=part.stage + 1))
    return needs


def bubble(name: str, ranks: int, times: Times) -> float:
    """Idle time of a rank by the formulas of V3's table 2, without hops; of `ranks` devices."""
    if name == "1f1b":
        return (ranks - 1) * (times.forward + times.backward)
    if name == "zb1p":
        return (ranks - 1) * (times.forward + times.backward - 2 * times.weight)
    pairs = ranks // 2 if name == "dualpipe" else ranks
    return (pairs - 1) * (times.pair + times.backward - 3 * times.weight)


def _check(ranks, micro_batches, least):
    if ranks < 1 or micro_batches < least:
        raise ValueError(f"{ranks=} must be at least 1, {micro_batches=} at least {least}")
