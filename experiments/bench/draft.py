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
from deepseek_jax.generate import ONE_THREAD, Text
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
    rounds, steps = in_rounds(model, prompt_BT[: args.timed], lengths_B, args.new)
    tokens_per_step = args.new * len(rounds) / steps
    plain, drafted, *parts = np.transpose(rounds)
    plain_step, draft, verification = np.median(parts, axis=1)
    cost = np.median((parts[1] + parts[2]) / parts[0])
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
        "plain_ms": 1e3 * plain_step,
        "draft_ms": 1e3 * draft,
        "verify_ms": 1e3 * verification,
        "cost_of_a_step": cost,  # 1 + c
        # Of the timed texts, whose drafts are not accepted as often as those of all.
        "expected_speed_up": tokens_per_step / cost,
        "speed_up": np.median(plain / drafted),
    }


def in_rounds(model: Model, prompt_BT, lengths_B, new: int) -> tuple[np.ndarray, int]:
    """Seconds [round, 5] of one text without and with drafts and of a plain step, a draft and a
    verification of it apart; and the steps of all texts with drafts.

    From when the prompt is read, one right after the other: what slows the machine for a while
    slows all of them.
    """
    begin = lambda row, draft: Text(
        model, prompt_BT[[row]], lengths_B=lengths_B[[row]], max_new_tokens=new, draft=draft
    )
    options = begin(0, True).compiler_options
    # Not in one graph: these loops know their ends, so the host need not look after each step, and
    # as one graph a step took 0.94 ms on an H200 where generation takes 0.34 ms.
    options = ONE_THREAD if options == ONE_THREAD else None
    apart = each_apart(new, model.config.num_mtp, options)
    rounds, steps = [], 0
    for row in [0, *TURNS * list(range(len(prompt_BT)))]:
        seconds = []
        for draft in (False, True):
            text = begin(row, draft)
            jax.block_until_ready(text.state)
            began = time.perf_counter()
            tokens_BS, *_ = text.advance()
            seconds.append(time.perf_counter() - began)
        # What the first round compiles does not count.
        steps += text.report.steps if rounds else 0
        for count, program in apart:
            text = begin(row, draft=True)
            # Of a text that is known, or all would choose the same experts.
            state = dataclasses.replace(text.state, tokens_BS=jnp.asarray(tokens_BS))
            jax.block_until_ready(state)
            began = time.perf_counter()
            jax.block_until_ready(program(text.model, state, text.stop_N))
            seconds.append((time.perf_counter() - began) / count)
        rounds.append(seconds)
    return np.array(rounds[1:]), steps


def each_apart(
    new: int, drafts: int, compiler_options: dict[str, str] | None
) -> list[tuple[int, Callable]]:
    """Programs of plain steps, of drafts and of verifications over so many tokens of a text whose
    continuation is known, and how many of them each makes."""
    sampling = Sampling()

    def plain(model, state, stop_N):
        return plain_step(model, state, sampling, stop_N)

    def draft(model, state, stop_N):
        ahead, _, draft_BP, _ = draft_tokens(
            model, state.ahead, state.tokens_BS, state.length_B, sampling, state.key
        )
        ahead = dataclasses.replace(ahead, start_B=ahead.start_B + 1)
        # Never true, but then the next draft has to wait for this one.
        tokens_BS = jnp.where(state.tokens_BS < 0, draft_BP[:, :1], state.tokens_BS)
        return dataclasses.replace(
            state, ahead=ahead, tokens_BS=tokens_BS, length_B=state.length_B + 1
        )

    def verification(model, state, stop_N):
        draft_BP = window(state.tokens_BS, state.length_B, drafts)
        return verified_step(model, state, None, draft_BP, sampling, stop_N)

    def many(count, step):
        def every(model, state, stop_N):
            return jax.lax.fori_loop(0, count, lambda _, state: step(model, state, stop_N), state)

        return count, jax.jit(every, donate_argnums=1, compiler_options=compiler_options)

    kept = -(-new // (1 + drafts))
    return [many(new, plain), many(new, draft), many(kept, verification)]


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
