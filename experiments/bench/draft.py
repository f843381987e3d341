"""`bench draft`: what drafting with MTP modules gives on a run's validation text."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deepseek_jax.config import Precision
from deepseek_jax.counts import param_counts
from deepseek_jax.decoding import plain_step, verified_step
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
    """Tokens compared on all prompts; times of one text at a time."""
    texts = {}
    for draft in (False, True):
        text = Text(model, prompt_BT, lengths_B=lengths_B, max_new_tokens=args.new, draft=draft)
        texts[draft] = text.new_tokens(*text.advance()[:2]), text.report
    seconds = np.zeros((2,))
    for row in range(min(args.timed, len(prompt_BT))):
        one = slice(row, row + 1)
        seconds += fastest(model, prompt_BT[one], lengths_B[one], args.new)
    plain, draft, verification = step_seconds(model, prompt_BT[:1])
    report = texts[True][1]
    cost = (draft + verification) / plain
    return {
        "device": jax.devices()[0].device_kind,
        "precision": model.precision.matmul,
        "products": text.model.precision.matmul,
        "parameters": param_counts(model.config).total,
        "same_texts": int((texts[False][0] == texts[True][0]).all(axis=1).sum()),
        "texts": len(prompt_BT),
        "acceptance": report.acceptance,
        "tokens_per_step": report.tokens_per_step,
        "plain_ms": 1e3 * plain,
        "draft_ms": 1e3 * draft,
        "verify_ms": 1e3 * verification,
        "cost_of_a_step": cost,  # 1 + c
        "expected_speed_up": report.tokens_per_step / cost,
        "speed_up": seconds[0] / seconds[1],
    }


def fastest(model: Model, prompt_BT, lengths_B, new: int) -> np.ndarray:
    """Seconds of the new tokens of one text without and with drafts: the best of five in turns."""
    best = np.full((2,), np.inf)
    for _ in range(5):
        for draft in (False, True):
            text = Text(model, prompt_BT, lengths_B=lengths_B, max_new_tokens=new, draft=draft)
            jax.block_until_ready(text.state)  # the prompt is read
            began = time.perf_counter()
            text.advance()
            best[int(draft)] = min(best[int(draft)], time.perf_counter() - began)
    return best


def step_seconds(model: Model, prompt_BT) -> list[float]:
    """Seconds of a plain step, of a draft, and of the verification of a draft, each apart.

    Medians over many rounds in which each runs in turn, sixteen times in one program.
    """
    new = min(256, model.config.max_length - prompt_BT.shape[1])
    text = Text(model, prompt_BT, max_new_tokens=new, draft=True)
    sampling, stop_N, model = Sampling(), text.stop_N, text.model

    def plain(model, state):
        return plain_step(model, state, sampling, stop_N)

    def draft(model, state):
        ahead, _, draft_BP, _ = draft_tokens(
            model, state.ahead, state.tokens_BS, state.length_B, sampling, state.key
        )
        # Never true, but then the next draft has to wait for this one.
        tokens_BS = jnp.where(state.tokens_BS < 0, draft_BP[:, :1], state.tokens_BS)
        return dataclasses.replace(state, ahead=ahead, tokens_BS=tokens_BS)

    def verification(model, state):
        draft_BP = jnp.broadcast_to(state.lost % 2, (1, model.config.num_mtp))
        return verified_step(model, state, None, draft_BP, sampling, stop_N)

    def sixteen(step):
        every = lambda model, state: jax.lax.fori_loop(0, 16, lambda _, s: step(model, s), state)
        return jax.jit(every)

    steps = [sixteen(step) for step in (plain, draft, verification)]
    seconds = []
    for _ in range(20):
        seconds.append([])
        for step in steps:
            began = time.perf_counter()
            jax.block_until_ready(step(model, text.state))
            seconds[-1].append((time.perf_counter() - began) / 16)
    return np.median(seconds[3:], axis=0).tolist()


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
