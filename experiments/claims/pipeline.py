"""Claims on pipelines: bubbles and memory of schedules, table 4's parts, micro-batches in turn."""

from experiments.claims.claim import EXACT, MODELLED, Claim, Tolerance, within
from experiments.claims.training import PARTS
from sharding.pipeline import SCHEDULES, Times, bubble, dualpipe, simulate

NAMES = ("1f1b", "zb1p", "dualpipe")


def bubbles(*, ranks: int, micro_batches: int, hop: float) -> dict[str, float]:
    """Idle time of the rank that idles most, simulated, in forwards of a chunk."""
    times = Times(forward=1, backward=2, weight=1, pair=3, hop=hop)
    return {
        name: max(simulate(SCHEDULES[name](ranks, micro_batches), times).bubbles) for name in NAMES
    }


def folded_bubble(*, ranks: int, micro_batches: int) -> float:
    """The same of DualPipeV, whose devices hold two stages."""
    return max(simulate(SCHEDULES["dualpipe_v"](ranks, micro_batches), Times()).bubbles)


def chunks_held(*, ranks: int, micro_batches: int) -> dict[str, int]:
    """The most chunks whose activations a rank holds at a time."""
    return {
        name: max(simulate(SCHEDULES[name](ranks, micro_batches), Times()).held) for name in NAMES
    }


def pair_seconds(*, ranks: int, micro_batches: int, milliseconds: float) -> dict[str, float]:
    """Seconds of a step in overlapped pairs, the mean of all ranks."""
    schedule = dualpipe(ranks, micro_batches)
    pairs = sum(len(task) == 2 for rank in schedule for task in rank) / ranks
    return {"1F1B": pairs * milliseconds / 1e3}


def ideal_bubble(*, ranks: int, micro_batches: int) -> dict[str, float]:
    """The formula's bubble with table 4's times of a chunk, seconds."""
    first = dualpipe(ranks, micro_batches)[0]
    count = lambda *kinds: sum(len(t) == 1 and t[0].what in kinds for t in first)
    parts = PARTS["MPFT"]
    times = Times(
        forward=parts["1F"] / count("forward"),
        backward=parts["1B"] / count("backward", "input"),
        weight=parts["1W"] / count("weight"),
        pair=parts["1F1B"] / sum(len(task) == 2 for task in first),
    )
    return {"bubble": bubble("dualpipe", ranks, times)}


def overlap(*, micro_batches: int, layers: int, communication: float) -> float:
    """How many times faster decoding gets when micro-batches take turns on GPU and network.

    Each computes for a unit of time in every layer and then communicates.
    """
    free = {"gpu": 0.0, "network": 0.0}
    ready = [0.0] * micro_batches
    for _ in range(layers):
        for resource, seconds in (("gpu", 1.0), ("network", communication)):
            for i in range(micro_batches):
                start = max(ready[i], free[resource])
                free[resource] = ready[i] = start + seconds
    return micro_batches * layers * (1 + communication) / max(ready)


V3 = dict(ranks=16, micro_batches=120)

CLAIMS = (
    Claim(
        name="bubbles",
        section="V3 report, 3.2.1, table 2",
        says="bubbles (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W)",
        printed={"1f1b": 15 * 3, "zb1p": 15 * 1, "dualpipe": 7 * 2},
        compute=bubbles,
        inputs=V3 | dict(hop=0.0),
        tolerance=EXACT,
        how="Every rank's tasks simulated in order: PP = 16, 120 micro-batches, F = 1, B = 2 with "
        "W = 1 of it, F&B = 3. With hops between ranks, or chunks that are not equal, the "
        "simulated bubbles differ from the formulas.",
        otherwise=dict(hop=0.1),
    ),
    Claim(
        name="bubble_dualpipe_v",
        section="DualPipe, README",
        says="DualPipeV has DualPipe's bubble on half of the devices",
        printed=7 * 2,
        compute=folded_bubble,
        inputs=dict(ranks=8, micro_batches=60),
        tolerance=EXACT,
        how="16 stages folded on 8 devices, each micro-batch down and up again; simulated.",
        otherwise=dict(ranks=16),
    ),
    Claim(
        name="pipeline_memory",
        section="V3 report, 3.2.1, table 2",
        says="activations of PP, PP and PP + 1 chunks",
        printed={"1f1b": 16, "zb1p": 16, "dualpipe": 17},
        compute=chunks_held,
        inputs=V3,
        tolerance=EXACT,
        how="Forwards run whose backward has not, at most, on the rank that holds most; DualPipe "
        "keeps two stages' parameters on each.",
        otherwise=dict(ranks=8),
    ),
    Claim(
        name="table_4_pairs",
        section="5.1, table 4",
        says="seconds of a step in overlapped forwards and backwards",
        printed={"1F1B": 13.95},
        compute=pair_seconds,
        inputs=V3 | dict(milliseconds=129.0),
        tolerance=within(0.10),
        verdict=MODELLED,
        how="DualPipe's count of pairs, 97 to 103 a rank, times the 129 ms that one takes in the "
        "training trace that DeepSeek published, which leaves out traffic between stages.",
        otherwise=dict(micro_batches=60),
    ),
    Claim(
        name="table_4_bubble",
        section="5.1, table 4",
        says="seconds of a step in bubbles",
        printed={"bubble": 2.06},
        compute=ideal_bubble,
        inputs=V3,
        tolerance=Tolerance(
            "same order: a third to all of it",
            lambda ours, printed: printed / 3 <= ours <= printed,
        ),
        verdict=MODELLED,
        how="The formula with table 4's parts over rank 0's counts: 49 ms forward, 87 backward, 32 "
        "weights, 144 a pair. It gives half of what is printed, which holds more than the ideal "
        "schedule's idle time.",
        otherwise=dict(ranks=4),
    ),
    Claim(
        name="two_micro_batches",
        section="2.3.1",
        says="two micro-batches in turn hide communication behind computation: times faster",
        printed=2.0,
        compute=overlap,
        inputs=dict(micro_batches=2, layers=61, communication=1.0),
        tolerance=within(0.02),
        verdict=MODELLED,
        how="GPU and network each serve one micro-batch at a time; computation and communication "
        "of a layer take the same time, where the gain is largest. In 61 layers 1.98.",
        otherwise=dict(micro_batches=1),
    ),
)  # fmt: skip
