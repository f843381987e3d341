"""Pipeline schedules against the paper's formulas, counts by hand, and what each part awaits."""

import pytest

from sharding.pipeline import SCHEDULES, Part, Times, bubble, dualpipe, one_f_one_b, simulate

EQUAL = Times(forward=1, backward=2, weight=1, pair=3)
SIZES = [(4, 20), (6, 30), (16, 120)]


@pytest.mark.parametrize("ranks, micro_batches", SIZES, ids=["P4", "P6", "P16"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bubbles_are_the_formulas(name, ranks, micro_batches):
    made = simulate(SCHEDULES[name](ranks, micro_batches), EQUAL)
    assert made.bubbles == pytest.approx([bubble(name, ranks, EQUAL)] * ranks)


def test_formulas_by_hand():
    times = Times(forward=2, backward=5, weight=2, pair=6)
    found = [bubble(name, 8, times) for name in ("1f1b", "zb1p", "dualpipe")]
    assert found == [7 * 7, 7 * 3, 3 * 5]
    assert bubble("dualpipe_v", 4, times) == bubble("dualpipe", 8, times)


@pytest.mark.parametrize("name", ["1f1b", "zb1p"])
def test_bubbles_of_uneven_chunks(name):
    times = Times(forward=1, backward=3, weight=1, pair=3.5)
    made = simulate(SCHEDULES[name](6, 20), times)
    assert max(made.bubbles) == pytest.approx(bubble(name, 6, times))


def test_a_pair_that_overlaps_shortens_the_bubble_as_the_formula_says():
    times = Times(forward=1, backward=2, weight=1, pair=2.4)
    made = simulate(dualpipe(8, 40), times)
    assert max(made.bubbles) == pytest.approx(bubble("dualpipe", 8, times)) == pytest.approx(4.2)


def test_a_small_timeline_by_hand():
    made = simulate(one_f_one_b(2, 2), EQUAL)
    spans = [[(s.task[0].what[0], s.start, s.end) for s in rank] for rank in made.spans]
    assert spans == [
        [("f", 0, 1), ("f", 1, 2), ("b", 4, 6), ("b", 7, 9)],
        [("f", 1, 2), ("b", 2, 4), ("f", 4, 5), ("b", 5, 7)],
    ]
    assert made.seconds == 9 and made.bubbles == [3, 3] and made.held == [2, 1]


def test_counts_of_v3():
    """16 ranks, 120 micro-batches: lone forwards, pairs, backwards, weights' parts."""
    schedule = dualpipe(16, 120)
    for rank, right in ((0, (23, 97, 23, 15)), (7, (17, 103, 17, 8)), (15, (23, 97, 23, 15))):
        lone = [task[0].what for task in schedule[rank] if len(task) == 1]
        pairs = sum(len(task) == 2 for task in schedule[rank])
        backwards = lone.count("backward") + lone.count("input")
        assert (lone.count("forward"), pairs, backwards, lone.count("weight")) == right


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_chunk_runs_once_and_after_what_it_needs(name):
    ranks, micro_batches = 4, 16
    made = simulate(SCHEDULES[name](ranks, micro_batches), Times(1, 2.5, 0.7, 3, hop=0.25))
    ends = {part: span.end for rank in made.spans for span in rank for part in span.task}
    starts = {part: span.start for rank in made.spans for span in rank for part in span.task}
    assert len(ends) == sum(len(span.task) for rank in made.spans for span in rank)
    stages = 2 * ranks if name == "dualpipe_v" else ranks
    directions = 2 if name == "dualpipe" else 1
    chunks = stages * micro_batches  # either direction has half of the micro-batches
    forwards = [part for part in ends if part.what == "forward"]
    backs = [part for part in ends if part.what in ("backward", "input")]
    assert len(forwards) == len(backs) == chunks
    assert {part.direction for part in forwards} == set(range(directions))
    for part in backs:
        assert ends[part._replace(what="forward")] <= starts[part]
        if part.what == "input":
            assert starts[part._replace(what="weight")] >= ends[part]
        if part.stage < stages - 1:
            above = part._replace(stage=part.stage + 1)
            above = above if above in ends else _other(above)
            assert starts[part] >= ends[above]
    for part in forwards:
        if part.stage:
            assert starts[part] >= ends[part._replace(stage=part.stage - 1)]


def _other(part: Part) -> Part:
    return part._replace(what="input" if part.what == "backward" else "backward")


def test_memory_is_that_of_the_papers_table():
    held = {n: max(simulate(SCHEDULES[n](8, 40), EQUAL).held) for n in ("1f1b", "zb1p", "dualpipe")}
    assert held == {"1f1b": 8, "zb1p": 8, "dualpipe": 9}
    assert max(simulate(SCHEDULES["dualpipe_v"](4, 20), EQUAL).held) == 9


def test_hops_add_to_the_bubble():
    still, moving = (max(simulate(one_f_one_b(4, 8), Times(hop=hop)).bubbles) for hop in (0.0, 0.1))
    assert moving > still + 0.59  # down and up again over three ranks


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dualpipe(5, 20), "even ranks=5"),
        (lambda: dualpipe(4, 6), "micro_batches=6 at least 8"),
        (lambda: one_f_one_b(4, 3), "at least 4"),
        (lambda: Times(forward=0), "forward=0"),
        (lambda: Times(backward=1, weight=1), "weight=1"),
    ],
    ids=["odd-ranks", "few", "fewer-than-ranks", "no-time", "weight"],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ranks_that_wait_for_each_other_are_found():
    schedule = one_f_one_b(2, 2)
    schedule[1].reverse()
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(schedule, EQUAL)
