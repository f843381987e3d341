"""`bench residual`: a dense model whose branches round what they add, in each format for combine.

The paper's own trial of LogFMT (ISCA section 3.2) at a size that one GPU trains in half a minute.
Runs of a seed have the same weights and data, so that their gaps are those of the formats; BF16
runs of different seeds give the gaps their scale.
"""

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deepseek_jax.config import ModelConfig, Run
from deepseek_jax.residual import rounded
from deepseek_jax.training import join
from experiments.bench.pieces import (
    Curves,
    PieceArgs,
    Trained,
    curves_of,
    gap,
    gaps,
    loss_and_gap_axes,
    million_tokens,
    piece_row,
    short_run,
)
from experiments.provenance import provenance
from experiments.recipes import recipe
from experiments.tables import print_table, write_json

EXACT = "bf16"
# From the smallest error to the largest, as section 3.2 of the paper has them.
ORDER = ("logfmt10", "logfmt8", "e4m3", "e5m2")
COLOURS = {"bf16": "black", "logfmt10": "tab:green", "logfmt8": "tab:blue", "e4m3": "tab:orange",
           "e5m2": "tab:red"}


class Piece(NamedTuple):
    """One run."""

    format: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.format}-{self.seed}"

    def of(self, run: Run) -> Run:
        return replace(run, precision=replace(run.precision, residual=self.format), seed=self.seed)

    def batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


@dataclass(frozen=True)
class BenchResidualArgs(PieceArgs):
    """Train a dense model with what its branches add rounded to FP8 or LogFMT, beside BF16.

    Without --only all missing pieces are trained, one seed after the other: bf16-0, logfmt10-0,
    logfmt8-0, e4m3-0, e5m2-0, bf16-1, ... What is there is compared.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "dense"
    """dense (121 M parameters, none of them experts'), or a recipe such as tiny."""
    out: Path = Path("runs/residual")
    """Folder of the curves, a file for each piece, and of residual.svg."""
    evaluations: int = 16
    """Points of the validation curve."""


def dense_config() -> ModelConfig:
    """V3's attention in 12 dense layers at D = 768, 121 M parameters."""
    return ModelConfig(
        vocab_size=16384,
        model_dim=768,
        num_layers=12,
        num_dense_layers=12,
        num_heads=8,
        content_head_dim=64,
        rotary_head_dim=64,
        value_head_dim=128,
        query_latent_dim=384,
        kv_latent_dim=256,
        dense_ffn_dim=2560,
        # Of experts, which it has none of.
        expert_ffn_dim=1,
        num_experts=1,
        num_shared_experts=0,
        experts_per_token=1,
        max_length=1024,
        init_std=0.02,
    )


def dense_run(steps: int | None = None) -> Run:
    """6.6 M tokens in steps of 16 K."""
    run = short_run(dense_config(), steps or 400, batch=16, warmup=0.05)
    # FP32 moments: the first of them shows a gradient as it is.
    return replace(run, precision=replace(run.precision, moments="fp32"))


def bench_residual(args: BenchResidualArgs) -> None:
    """Trains missing pieces, prints a row for each, errors, gaps and verdicts, and draws them."""
    base = dense_run(args.steps) if args.recipe == "dense" else recipe(args.recipe)(args.steps)
    base = replace(base, data=args.data or base.data)
    curves = curves_of(base, {p.name: p for p in all_pieces(args.seeds)}, args, measure)
    if curves is None:
        return
    rows = [piece_row(name, curve) for name, curve in curves.items()]
    print_table(rows, title=f"{args.recipe}: pieces")
    found, verdicts = compare(curves), judge(curves)
    print_table(found, title="errors in % of the norm; relative gap of the validation loss, "
                "last quarter, to BF16 of the same seed")
    print_table(verdicts, title="verdicts")
    draw(curves, args.out / "residual.svg")
    print(f"plot     {args.out / 'residual.svg'}")
    if args.json is not None:
        write_json(args.json, {**provenance(), "recipe": args.recipe, "pieces": rows,
                               "formats": found, "verdicts": verdicts, "curves": curves})


def all_pieces(seeds: int) -> list[Piece]:
    """A seed's formats together: what has been trained can be compared at any time."""
    return [Piece(format, seed) for seed in range(seeds) for format in (EXACT, *ORDER)]


def measure(piece: Piece, trained: Trained) -> dict[str, Any]:
    """At the weights that a piece ends with and the last batch, the errors that formats make.

    Of BF16, errors of what its layers add; of a format, the error of the gradient beside BF16's.
    """
    if piece.format == EXACT:
        return {"branch errors": branch_errors(trained)}
    plain = replace(trained.run, precision=replace(trained.run.precision, residual=EXACT))
    exact = gradient(trained, plain)
    found = gradient(trained, trained.run)
    off = jax.tree.map(jnp.subtract, found, exact)
    return {"gradient error": norm(off) / norm(exact)}


def gradient(trained: Trained, run: Run) -> Any:
    """The clipped gradient, but for a factor: a first moment after one step from 0."""
    state = jax.tree.map(jnp.copy, trained.state)
    state = replace(state, first=jax.tree.map(jnp.zeros_like, state.first))
    state, _ = trained.step_of(run)(state, trained.batch)
    return state.first


def norm(tree: Any) -> float:
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return float(jnp.sqrt(sum(squares)))


def branch_errors(trained: Trained) -> dict[str, float]:
    """Relative error of each format on what the layers of the model add, all layers together."""

    @jax.jit
    def errors(params, biases, tokens_BT):
        _, aux = join(trained.run, params, biases).hidden(tokens_BT, every_layer=True)
        # The last of them is after the final norm.
        added = jnp.diff(aux.hidden_LBTD[:-1].astype(jnp.float32), axis=0)
        off = {format: norm_of(rounded(added, format) - added) for format in ORDER}
        return {format: value / norm_of(added) for format, value in off.items()}

    norm_of = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
    tokens_BT = trained.batch["tokens"][0, :2, :-1]
    found = errors(trained.state.params, trained.state.biases, tokens_BT)
    return {format: float(value) for format, value in found.items()}


def compare(curves: Curves) -> list[dict[str, Any]]:
    """A row for each format, and one for BF16 of other seeds."""
    rows = []
    for format in ORDER:
        own = {c["seed"]: c for c in curves.values() if c["format"] == format}
        found = paired(curves, format)
        rows.append({
            "format": format,
            "seeds": len(own),
            "branches %": mean_of(100 * c["branch errors"][format] for c in curves.values()
                                  if c["format"] == EXACT),
            "gradient %": mean_of(100 * c["gradient error"] for c in own.values()),
            "gap %": mean_of(100 * value for value in found),
            "+-": 100 * standard_error(found) if len(found) > 1 else None,
        })
    others = seed_gaps(curves)
    rows.append({"format": "bf16, other seeds", "seeds": len(others),
                 "gap %": mean_of(100 * abs(value) for value in others)})
    return rows


def paired(curves: Curves, format: str, other: str = EXACT) -> list[float]:
    """Gaps of a format to another one, seed by seed."""
    by_seed = lambda wanted: {c["seed"]: c for c in curves.values() if c["format"] == wanted}
    ours, theirs = by_seed(format), by_seed(other)
    return [gap(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def seed_gaps(curves: Curves) -> list[float]:
    """Gaps between BF16 runs that differ in the seed alone."""
    exact = [c for c in curves.values() if c["format"] == EXACT]
    return [gap(b, a) for a, b in combinations(exact, 2)]


def judge(curves: Curves) -> list[dict[str, Any]]:
    """Errors in the paper's order; LogFMT-10 as good as BF16; LogFMT-8 not worse than FP8."""
    rows = {row["format"]: row for row in compare(curves)}
    verdicts = []
    for what in ("branches %", "gradient %"):
        errors = [rows[format][what] for format in ORDER]
        if None not in errors:
            verdicts.append({"bar": f"{what[:-2]}: errors of {', '.join(ORDER)} rise",
                             "found": " ".join(f"{e:.3g} %" for e in errors),
                             "holds": errors == sorted(errors)})
    spread = [abs(value) for value in seed_gaps(curves)]
    ten = paired(curves, "logfmt10")
    if ten and spread:
        verdicts.append({"bar": "loss of logfmt10: within the spread of BF16's seeds",
                         "found": f"{np.mean(ten):+.4%} of {max(spread):.3%}",
                         "holds": bool(abs(np.mean(ten)) <= max(spread))})
    for other in ("e4m3", "e5m2"):
        found = paired(curves, "logfmt8", other)
        if len(found) > 1:
            mean, noise = float(np.mean(found)), 2 * standard_error(found)
            said = "lower" if mean < -noise else "higher" if mean > noise else "within its noise"
            verdicts.append({"bar": f"loss of logfmt8: above {other}'s by no more than the noise",
                             "found": f"{mean:+.4%} +- {noise:.4%}, {said}",
                             "holds": mean <= noise})
    return verdicts


def mean_of(values: Any) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def draw(curves: Curves, path: Path) -> None:
    """Validation loss of every piece, and smoothed gaps to BF16 of the same seed."""
    with loss_and_gap_axes(path) as (loss_axes, gap_axes):
        named: set[str] = set()
        for curve in curves.values():
            format, losses = curve["format"], [loss for _, loss in curve["validation"]]
            loss_axes.plot(million_tokens(curve), losses, color=COLOURS[format], linewidth=1.0,
                           label=None if format in named else format)
            named.add(format)
        exact = {c["seed"]: c for c in curves.values() if c["format"] == EXACT}
        lines = [(c["format"], c, exact.get(c["seed"])) for c in curves.values()]
        lines += [("other seeds", b, a) for a, b in combinations(exact.values(), 2)]
        named = set()
        for label, curve, base in lines:
            if label == EXACT or base is None:
                continue
            gap_axes.plot(million_tokens(curve), 100 * gaps(curve, base), linewidth=1.0,
                          color=COLOURS.get(label, "lightgray"),
                          label=None if label in named else label)
            named.add(label)
