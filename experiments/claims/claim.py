"""A claim of the paper: what it prints, how we compute it, how near is near enough, the verdict.

"The paper" is "Insights into DeepSeek-V3" (ISCA 2025, arXiv 2505.09343); the reports on V2, V3 and
R1, and the service figures that DeepSeek published, are named where they are meant.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

AGREES = "agrees"
BY_RULE = "agrees with a stated rule"
WRONG = "printed value is wrong"
MODELLED = "modelled"
NOT_HERE = "not reproducible here"
# Of what a machine with a GPU has yet to record.
NOT_YET = "not measured yet"
# What no claim should get: a value that is not what it should be.
DISAGREES = "disagrees"

Verdict = Literal[
    "agrees", "agrees with a stated rule", "printed value is wrong", "modelled",
    "not reproducible here", "not measured yet", "disagrees",
]  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "results"
Value = Any  # a number, a text, a list, or a mapping from names to such values


class Tolerance(NamedTuple):
    """When our value counts as the printed one."""

    words: str
    holds: Callable[[Any, Any], bool]  # of ours and printed, one value each


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of the table. `verdict` is the one it gets if ours is within the tolerance."""

    name: str
    section: str  # of the paper, or the document and its section
    says: str  # what is claimed
    printed: Value
    compute: Callable[..., Value]
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of compute, shown
    tolerance: Tolerance
    verdict: Verdict = AGREES
    how: str  # formula, sources, what was measured and what modelled; also the stated rule
    # Of a misprint: what should be printed, by another way than ours.
    correct: Value = None
    # The file of RESULTS that the value comes from, where it takes a GPU or long training.
    recorded: str = ""
    measured_by: str = "claims --measure experiments/results"  # the command that makes the file
    # Inputs with which the verdict must be another, which shows what it hangs on.
    otherwise: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A claim with our value."""

    claim: Claim
    ours: Value
    verdict: Verdict


def evaluate(claim: Claim, **changes: Any) -> Result:
    """Computes a claim, with other inputs if wanted, and judges it."""
    if claim.recorded and not (RESULTS / claim.recorded).is_file():
        return Result(claim, None, NOT_YET)
    ours = claim.compute(**{**claim.inputs, **changes})
    return Result(claim, ours, judge(claim, ours))


def judge(claim: Claim, ours: Value) -> Verdict:
    """The verdict on a value of ours."""
    if claim.verdict == NOT_HERE:
        return NOT_HERE
    if claim.verdict == WRONG:
        right = agree(claim.tolerance, ours, claim.correct)
        return WRONG if right and not agree(claim.tolerance, ours, claim.printed) else DISAGREES
    return claim.verdict if agree(claim.tolerance, ours, claim.printed) else DISAGREES


def agree(tolerance: Tolerance, ours: Value, printed: Value) -> bool:
    """Whether every value of ours counts as the printed one."""
    if isinstance(printed, Mapping):
        return set(ours) == set(printed) and all(
            agree(tolerance, ours[name], printed[name]) for name in printed
        )
    # What the paper does not print beside what it does is shown, not judged.
    return printed is None or bool(tolerance.holds(ours, printed))


def decimals(number: float) -> int:
    """Digits behind the point of a number as printed.

    >>> decimals(70.272), decimals(250)
    (3, 0)
    """
    text = repr(number)
    return 0 if text.endswith(".0") else len(text.partition(".")[2])


def cut(number: float, digits: int) -> float:
    """What is left of a number without its further digits.

    >>> cut(66.1, 0), cut(67.76, 0), cut(0.29, 2)
    (66.0, 67.0, 0.29)
    """
    # 0.29 is less than 29 hundredths in binary.
    return math.trunc(number * 10**digits + 1e-9) / 10**digits


def within(fraction: float) -> Tolerance:
    """At most this fraction of the printed value away."""
    return Tolerance(
        f"{100 * fraction:.3g} %", lambda ours, printed: abs(ours - printed) <= fraction * printed
    )


def apart(distance: float, unit: str = "") -> Tolerance:
    """At most this far from the printed value."""
    return Tolerance(
        f"+-{distance:g}{unit}",
        # Printed values are decimal fractions, which are not exact in binary.
        lambda ours, printed: abs(ours - printed) <= distance * (1 + 1e-9),
    )


def between(low: float, high: float, words: str | None = None) -> Tolerance:
    """Anywhere in a range, whatever is printed."""
    return Tolerance(words or f"{low:g} to {high:g}", lambda ours, printed: low <= ours <= high)


EXACT = Tolerance("exact", lambda ours, printed: ours == printed)
ROUNDED = Tolerance(
    "printed digits", lambda ours, printed: round(ours, decimals(printed)) == printed
)
CUT = Tolerance(
    "printed digits, cut off or rounded",
    lambda ours, printed: printed in (round(ours, decimals(printed)), cut(ours, decimals(printed))),
)
AT_MOST = Tolerance("at most", lambda ours, printed: ours <= printed)
NONE = Tolerance("-", lambda ours, printed: True)
