"""`bench draft`: what drafting with MTP modules gives on a run's validation text."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deepseek_jax.config import Precision
from deepseek_jax.counts import param_counts
from deepseek_jax.decoding import plain_step, verified_step, window
from deepseek_jax.drafting import draft_tokens
from deepseek_jax.generate import Text
from deepseek_jax.model import Model
from deepseek_jax.sampling import Sampling
from experiments.eval import load_run, recorded_shards, trained_model
from experiments.run_directory import RunDirectory
from experiments.tables import print_table

# Of DeepSeek-V3 with one module (ISCA, section 2.3.3).
PAPER_ACCEPTANCE = (0.8, 0.9)
PAPER_SPEED_UP = 1.8
# Rounds of all timed texts. Of their ratios the medians count.
TURNS = 5


@dataclass(frozen=True)
class BenchDraftArgs:
    """Greedy texts with and without drafts: the same tokens, acceptance, speed."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a run whose model has MTP modules."""
    prompts: int = 100
    """Prompts from the validation text, of 8 to 48 tokens."""
    new: int = 64
    """New tokens of each text."""
    timed: int = 8
    """Prompts that are also timed one by one."""
    precision: str | None = None
    """fp32 or bf16; by default that of the run. On a CPU BF16 weights are multiplied in FP32."""
    out: Path | None = None
    """Also draw the figures beside the paper's, to this file."""
    json: Path | None = None
    """Also write the table to this file."""


def bench_draft(args: BenchDraftArgs) -> None:
    """Prints one row, and draws it."""
    if args.prompts < 1 or args.timed < 1:
        raise ValueError(f"{args.prompts=} and {args.timed=} must be at least 1")
    directory = RunDirectory(args.run)
    run, state = load_run(directory)
    if args.precision is not None:
        run = dataclasses.replace(run, precision=Precision.of(args.precision))
    model = trained_model(run, state)
    prompt_BT, lengths_B = prompts(directory, args.prompts)
    rows = figures(model, prompt_BT, lengths_B, args)
    print_table([rows], title=f"bench draft {args.run}", json_path=args.json)
    if args.out is not None:
        draw(rows, args.out)
        print(f"drawn to {args.out}")


def prompts(directory: RunDirectory, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of the validation text and their lengths."""
    split = recorded_shards(directory).validation
    if split.num_tokens < 49:
        raise ValueError(f"{directory.path} has {split.num_tokens} tokens of validation text: "
                         "drafting is measured on at least 49")  # fmt: skip
    starts = np.linspace(0, split.num_tokens - 49, count).astype(int)
    prompt_BT = np.stack([split.read(int(start), int(start) + 48) for start in starts])
    return prompt_BT, np.random.default_rng(0).integers(8, 49, count)


def figures(model: Model, prompt_BT, lengths_B, args: BenchDraftArgs) -> dict[str, Any]:
    """Tokens compared on all prompts; times of one text at a time, on the first of them."""
    texts = {}
    for draft in (False, True):
        text = Text(model, prompt_BT, lengths_B=lengths_B, max_new_tokens=args.new, draft=draft)
        texts[draft] = text.new_tokens(*text.advance()[:2]), text.report
    rounds = in_rounds(model, prompt_BT[: args.timed], lengths_B, args.new)
    plain, drafted, tokens_per_step, *parts = np.transpose(rounds)
    step, draft, verification = np.median(parts, axis=1)
    cost = (parts[1] + parts[2]) / parts[0]
    report = texts[True][1]
    return {
        "device": jax.devices()[0].device_kind,
        "precision": model.precision.matmul,
        "products": text.model.precision.matmul,
        "parameters": param_counts(model.config).total,
        "same_texts": int((texts[False][0] == texts[True][0]).all(axis=1).sum()),
        "texts": len(prompt_BT),
        "acceptance": report.acceptance,
        "tokens_per_step": report.tokens_per_step,
        "plain_ms": 1e3 * step,
        "draft_ms": 1e3 * draft,
        "verify_ms": 1e3 * verification,
        "cost_of_a_step": np.median(cost),  # 1 + c
        # Of the timed texts, whose drafts may be accepted less or more often than those of all.
        "expected_speed_up": np.median(tokens_per_step / cost),
        "speed_up": np.median(plain / drafted),
    }


def in_rounds(model: Model, prompt_BT, lengths_B, new: int) -> np.ndarray:
    """[round, 6]: seconds of one text without and with drafts, the tokens of a step with them, and
    seconds of a plain step, a draft and a verification of that text, each apart.

    From when the prompt is read, one right after the other: what slows the machine for a while
    slows all of them.
    """
    begin = lambda row, draft: Text(
        model, prompt_BT[[row]], lengths_B=lengths_B[[row]], max_new_tokens=new, draft=draft
    )
    apart = each_apart(new, model.config.num_mtp)
    rounds = []
    for row in [0, *TURNS * list(range(len(prompt_BT)))]:
        found = []
        for draft in (False, True):
            text = begin(row, draft)
            jax.block_until_ready(text.state)
            began = time.perf_counter()
            tokens_BS, *_ = text.advance()
            found.append(time.perf_counter() - began)
        found.append(text.report.tokens_per_step)
        for count, program in apart:
            text = begin(row, draft=True)
            # Of a text that is known, or all would choose the same experts.
            state = dataclasses.replace(text.state, tokens_BS=jnp.asarray(tokens_BS))
            jax.block_until_ready(state)
            began = time.perf_counter()
            jax.block_until_ready(program(text.model, state, text.stop_N))
            found.append((time.perf_counter() - began) / count)
        rounds.append(found)
    return np.array(rounds[1:])  # the first one compiled


def each_apart(new: int, drafts: int) -> list[tuple[int, Callable]]:
    """Programs of plain steps, of drafts and of verifications over so many tokens of a text whose
    continuation is known, and how many of them each makes."""
    sampling = Sampling()

    def plain(model, state, stop_N):
        return plain_step(model, state, sampling, stop_N)

    def draft(model, state, stop_N):
        ahead, _, draft_BP, _ = draft_tokens(
            model, state.ahead, state.tokens_BS, state.length_B, sampling, state.key
        )
        # Never zero, but then each draft has to be made, and before the next one is begun.
        hidden_BWD = jnp.where(draft_BP[:, -1:, None] < 0, 0.0, ahead.hidden_BWD)
        hidden_BWD = hidden_BWD.astype(ahead.hidden_BWD.dtype)
        ahead = dataclasses.replace(ahead, hidden_BWD=hidden_BWD, start_B=ahead.start_B + 1)
        return dataclasses.replace(state, ahead=ahead, length_B=state.length_B + 1)

    def verification(model, state, stop_N):
        draft_BP = window(state.tokens_BS, state.length_B, drafts)
        return verified_step(model, state, None, draft_BP, sampling, stop_N)

    def many(count, step):
        def every(model, state, stop_N):
            return jax.lax.fori_loop(0, count, lambda _, state: step(model, state, stop_N), state)

        return count, jax.jit(every, donate_argnums=1)

    passes = -(-new // (1 + drafts))  # all drafts are right
    return [many(new, plain), many(new, draft), many(passes, verification)]


def draw(row: dict[str, Any], path: Path) -> None:
    """Acceptance and speed-up beside those of V3, which a tiny model is not expected to reach."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    left.bar(["this model"], [row["acceptance"]], color="tab:blue")
    left.axhspan(*PAPER_ACCEPTANCE, color="tab:gray", alpha=0.4, label="V3, in the paper")
    left.set(ylim=(0, 1), title="drafts accepted")
    left.legend(loc="lower right")
    right.bar(["measured", "(1 + p) / (1 + c)"], [row["speed_up"], row["expected_speed_up"]],
              color=["tab:blue", "tab:cyan"])  # fmt: skip
    right.axhline(PAPER_SPEED_UP, color="tab:gray", label="V3, in the paper")
    right.set(ylim=(0, 2), title="speed-up at batch 1")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
