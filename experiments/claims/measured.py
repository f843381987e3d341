"""Claims on what was measured on a GPU or trained for minutes, recorded in experiments/results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.bench import accumulation, logfmt, residual
from experiments.claims.claim import AT_MOST, BY_RULE, RESULTS, Claim, Tolerance, between

LOGFMT, ACCUMULATION, RESIDUAL = (
    f"bench_{name}_h200.json" for name in ("logfmt", "accumulation", "residual")
)
COMBINE = "combine.json"


def measure(folder: Path, data: tuple[str, ...]) -> None:
    """Measures all of these on this H200 in about ten minutes; each file says its card and date.

    Raises:
      ValueError: on another device, whose figures would stand for those of an H200.
    """
    found = jax.devices()[0].device_kind
    if "H200" not in found:
        raise ValueError(f"--measure records what an H200 does, and this is {found}")
    folder.mkdir(parents=True, exist_ok=True)
    logfmt.bench_logfmt(logfmt.BenchLogfmtArgs(out=folder))
    (folder / "logfmt.json").replace(folder / LOGFMT)
    accumulation.bench_accumulation(
        accumulation.BenchAccumulationArgs(json=folder / ACCUMULATION)
    )
    residual.bench_residual(residual.BenchResidualArgs(data=data, json=folder / RESIDUAL))


def recorded(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def loss_with_formats(*, order: Sequence[str]) -> dict[str, float]:
    """Errors of formats over those of the next worse; losses in units of what is noise."""
    found = recorded(RESIDUAL)
    curves, rows = found["curves"], {row["format"]: row for row in found["formats"]}
    ours = {}
    for what in ("branches", "gradient"):
        for better, worse in zip(order, order[1:], strict=False):
            ratio = rows[better][f"{what} %"] / rows[worse][f"{what} %"]
            ours[f"{what} error, {better} over {worse}"] = ratio
    best, second, *others = order
    spread = max(map(abs, residual.seed_gaps(curves)))
    gaps = residual.paired(curves, best)
    ours[f"loss of {best}: gap over spread of seeds"] = abs(sum(gaps) / len(gaps)) / spread
    for other in others:
        gaps = residual.paired(curves, second, other)
        mean, noise = sum(gaps) / len(gaps), 2 * residual.standard_error(gaps)
        ours[f"loss of {second}: above {other}, over noise"] = mean / noise
    return ours


def logfmt_overhead(*, copies: float) -> dict[str, float]:
    """% by which encoding and decoding take longer than copying the BF16 rows so often each."""
    rows = recorded(LOGFMT)["rows"]
    return {
        f"{bits} bits": 100 * (max(logfmt.over_copies(rows, bits)) / copies - 1)
        for bits in logfmt.BITS
    }


def card_error(*, sums: str) -> dict[str, float]:
    """Percent of error of sums of 4096 E4M3 products on the card."""
    rows = recorded(ACCUMULATION)["rows"]
    return {row["data"]: row["error %"] for row in rows if row["sum"] == sums}


def card_gain(*, sums: str) -> dict[str, float]:
    """How many times smaller the error of our kernel is."""
    ours = card_error(sums=accumulation.OURS)
    return {kind: error / ours[kind] for kind, error in card_error(sums=sums).items()}


def combine_formats(*, bits: tuple[int, int]) -> dict[str, float]:
    """Bytes of a row over those of n bits and two extremes a tile; % of loss over the plain run."""
    plain, *rows = recorded(COMBINE)["rows"]
    found = {}
    for n, row in zip(bits, rows, strict=True):
        width = plain["bytes a row"] // 4
        name = f"LogFMT-{n}"
        found[f"{name}: bytes"] = row["bytes a row"] / (-(-width // 128) * (128 * n / 8 + 4))
        found[f"{name}: loss, %"] = row["gap %"]
    return found


PAIRS = [f"{what} error, {pair}" for what in ("branches", "gradient") for pair in (
    "logfmt10 over logfmt8", "logfmt8 over e4m3", "e4m3 over e5m2")]  # fmt: skip

CLAIMS = (
    Claim(
        name="logfmt_training",
        section="3.2",
        says="LogFMT-8 trains better than E4M3 and E5M2, LogFMT-10 about as BF16",
        printed={name: 1.0 for name in (
            *PAIRS, "loss of logfmt10: gap over spread of seeds",
            "loss of logfmt8: above e4m3, over noise", "loss of logfmt8: above e5m2, over noise",
        )},
        compute=loss_with_formats,
        inputs=dict(order=residual.ORDER),
        tolerance=AT_MOST,
        verdict=BY_RULE,
        recorded=RESIDUAL,
        how="`bench residual`: a dense model of 121 M parameters whose branches round what they "
        "add, three seeds of each format, on one GPU; the paper's had 7 B. Errors must be in the "
        "paper's order; the loss of LogFMT-10 within the spread of BF16's seeds, that of LogFMT-8 "
        "not above FP8's by more than twice the standard error of the paired gaps.",
        otherwise=dict(order=("logfmt8", "logfmt10", "e5m2", "e4m3")),
    ),
    Claim(
        name="logfmt_overhead",
        section="3.2",
        says="encoding and decoding cost 50 to 100 % where combine is fused with them, %",
        printed={"8 bits": 100, "10 bits": 100},
        compute=logfmt_overhead,
        inputs=dict(copies=1),
        tolerance=AT_MOST,
        verdict=BY_RULE,
        recorded=LOGFMT,
        how="`bench logfmt` on one GPU: kernels that do nothing else, over copies of the BF16 "
        "rows that combine makes without them, which move more bytes. Ours are not fused with a "
        "transfer, so the figures stand beside the paper's and are not the same measurement.",
        otherwise=dict(copies=0.1),
    ),
    Claim(
        name="accumulation_card",
        section="3.1.1; V3 report, 3.3.2",
        says="a sum of 4096 products in the tensor core is off by about 2 %",
        printed={"zero-mean": 2.0, "positive": 2.0},
        compute=card_error,
        inputs=dict(sums=accumulation.FAST),
        tolerance=between(0.1, 8, "0.1 to 8 %, by the data"),
        verdict=BY_RULE,
        recorded=ACCUMULATION,
        how="`bench accumulation` on one GPU: cuBLASLt with fast accumulation beside float64; "
        "accumulation_error is the model of the same.",
        otherwise=dict(sums=accumulation.PRECISE),
    ),
    Claim(
        name="accumulation_card_gain",
        section="3.1.1; V3 report, 3.3.2",
        says="adding up in FP32 after every 128 elements cuts that error",
        printed={"zero-mean": 8, "positive": 50},
        compute=card_gain,
        inputs=dict(sums=accumulation.FAST),
        tolerance=Tolerance("at least so many times", lambda ours, printed: ours >= printed),
        verdict=BY_RULE,
        recorded=ACCUMULATION,
        how="The same operands through our block-scaled kernel, which promotes every 128 elements.",
        otherwise=dict(sums=accumulation.OURS),
    ),
    Claim(
        name="combine_formats",
        section="3.2",
        says="experts' results in LogFMT: their bytes, and the loss of a small model",
        printed={"LogFMT-8: bytes": 1.0, "LogFMT-8: loss, %": 0.0, "LogFMT-10: bytes": 1.0,
                 "LogFMT-10: loss, %": 0.0},
        compute=combine_formats,
        inputs=dict(bits=(8, 10)),
        tolerance=Tolerance(
            "bytes exact, loss +-0.5 %",
            lambda ours, printed: ours == printed or (printed == 0 and abs(ours) <= 0.5),
        ),
        verdict=BY_RULE,
        recorded=COMBINE,
        measured_by=f"bench combine tiny --steps 200 --json experiments/results/{COMBINE}",
        how="`bench combine tiny --steps 200`: experts on two devices of a CPU, activations in "
        "FP32, loss of the last 20 steps over that of the plain run; bytes over n bits a value "
        "and two BF16 extremes a tile. Choices of experts that flip make runs as different as the "
        "formats do: the order of the two is not to be read.",
        otherwise=dict(bits=(4, 10)),
    ),
)  # fmt: skip
