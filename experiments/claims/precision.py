"""Claims on formats in the model: the precision map of figure 1, read off the traced program."""

import functools
from collections.abc import Iterable

from deepseek_jax.training import abstract_state
from experiments.claims.claim import EXACT, Claim
from experiments.explain import ExplainArgs, forward_operations, parameter_rows, run_of
from experiments.program import ATTENTION, Op


@functools.lru_cache
def precision_map(*, precision: str, device: str) -> dict[str, str]:
    """What each component of V3 computes or travels in, forward, with a device's kernels."""
    run = run_of(ExplainArgs("deepseek_v3", precision=precision))
    state = abstract_state(run)
    ops = forward_operations(run, state, device)
    rows = {
        row["parameter"]: row["computes in"] for row in parameter_rows(run, state, ops, {})
    }

    def weights(*parts: str) -> str:
        """The format of the first use of all weights whose names hold one of the parts."""
        return _one(
            use.split(",")[0].split()[-1]
            for name, use in rows.items()
            if any(part in name for part in parts)
        )

    found = lambda keep: _one(op.computes for op in ops if keep(op))
    return {
        "attention matrices": weights(".attention.w"),
        "feed-forward matrices": weights(".ffn.w_", ".shared.w_"),
        "core attention": found(lambda op: op.name == ATTENTION),
        "norms": weights("norm_"),
        "router": weights("router_ED"),
        "head": weights("head_VD"),
        "loss": found(lambda op: op.part == "loss" and op.name == "log"),
        "dispatch": _one(_sent(op, run.config.model_dim, run.seq_len) for op in ops),
        "combine": _one(
            op.result.dtype for op in ops if _combines(op, run.config.model_dim, run.seq_len)
        ),
    }


def _sent(op: Op, width: int, tokens: int) -> str:
    """The format in which an operation gathers tokens into rows of experts; "" of all others.

    Rows travel as words of four bytes; fewer than one a channel are no channels, but their scales.
    """
    if op.name != "gather" or "experts" not in op.part or len(op.operands[0].shape) != 2:
        return ""
    rows, words = op.operands[0].shape
    if rows != tokens or op.operands[0].dtype != "uint32":
        return ""
    return {1: "fp8", 2: "bf16", 4: "fp32"}.get(4 * words / width, "")


def _combines(op: Op, width: int, tokens: int) -> bool:
    """Whether an operation takes rows of experts back to tokens."""
    return (
        "experts" in op.part
        and bool(op.operands)
        and op.operands[0].shape[1:] == (width,)
        and op.operands[0].shape[0] > tokens
        and op.result.shape == (tokens, width)
    )


def _one(values: Iterable[str]) -> str:
    """What all values are, or all that there are."""
    kinds = {value.partition("_")[0] for value in values} - {""}
    return " and ".join(sorted(kinds)) or "none"


CLAIMS = (
    Claim(
        name="figure_1",
        section="2.4, figure 1; V3 report, 3.3",
        says="the format that each component computes in, or travels in",
        printed={
            "attention matrices": "fp8", "feed-forward matrices": "fp8", "core attention": "bf16",
            "norms": "fp32", "router": "fp32", "head": "bf16", "loss": "fp32", "dispatch": "fp8",
            "combine": "bf16",
        },
        compute=precision_map,
        inputs=dict(precision="fp8", device="h200"),
        tolerance=EXACT,
        how="Operand formats in the traced forward program of V3 with the kernels of an H200, "
        "every weight of a kind (MTP too); dispatch and combine by the rows they gather. The same "
        "program is what `explain deepseek_v3 --precision fp8 --device h200` lists.",
        otherwise=dict(precision="bf16"),
    ),
)  # fmt: skip
