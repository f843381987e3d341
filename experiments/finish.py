"""The end of a run: its score on validation text, a sample, the summary and the report."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Run
from deepseek_jax.generate import Stream
from deepseek_jax.training import TrainState
from experiments import processes
from experiments.data import TokenShards, text_bytes
from experiments.data.tokenizer import Tokenizer
from experiments.display import duration
from experiments.eval import compressors, run_tokenizer, score, trained_model
from experiments.records import metrics_lines
from experiments.run_directory import RunDirectory
from experiments.tables import print_table, write_json

SAMPLE_TOKENS = 160


def finish(
    run: Run,
    directory: RunDirectory,
    shards: TokenShards,
    state: TrainState,
    json_path: Path | None,
) -> None:
    """Scores the validation text, samples, writes the summary and the report."""
    # Of all steps, those before an interruption included.
    seconds = sum(line["seconds"] for line, _ in metrics_lines(directory.metrics))
    summary: dict[str, Any] = {
        "steps": int(state.step),
        "tokens": run.position_at(run.steps) * run.seq_len,
        "skipped": int(state.skipped),
        "train_seconds": round(seconds, 1),
    }
    if shards.validation.num_documents:
        figures = score(run, state, shards, shards.validation, batch_size=run.micro_batch)
        summary |= {
            "val_bits_per_byte": figures["bits_per_byte"],
            "val_loss": figures["loss"],
            "val_tokens": figures["tokens"],
            "val_bytes": figures["bytes"],
        }
    tokenizer = tokenizer_of(directory)
    if tokenizer is not None:
        if shards.validation.num_documents:
            summary |= compressors(text_bytes(shards.validation, tokenizer))
        prompt = sample_prompt(shards, tokenizer)
        text = continue_text(run, state, tokenizer, prompt, seed=run.seed)
        summary["sample"] = {"prompt": prompt, "text": text}
    directory.write_summary(summary)
    row = {k: v for k, v in summary.items() if k != "sample"}
    print_table([row], title="result", json_path=None)
    if json_path is not None and processes.is_first():
        write_json(json_path, summary)
    if "sample" in summary:
        print(f"\nsample\n{summary['sample']['prompt']}{summary['sample']['text']}\n")
    path = write_report_if_possible(directory) if processes.is_first() else None
    if path is not None:
        print(f"report   {path}")
    print(f"trained in {duration(seconds)}; results in {directory.path}")


def tokenizer_of(directory: RunDirectory) -> Tokenizer | None:
    """The run's tokenizer; None where none came with the data or tokenizers is not installed.

    Raises:
      ValueError: it is not the one that the run was trained with.
    """
    if not directory.tokenizer.exists():
        return None
    try:
        return run_tokenizer(directory)
    except ImportError:
        return None


def sample_prompt(shards: TokenShards, tokenizer: Tokenizer) -> str:
    """The first words of a validation document."""
    split = shards.validation if shards.validation.num_documents else shards.train
    return tokenizer.decode(split.read(0, min(16, int(split.ends_J[0]) - 1)))


def continue_text(run: Run, state: TrainState, tokenizer, prompt: str, *, seed: int) -> str:
    """A continuation of the prompt, drawn at temperature 0.7, up to the end of the document."""
    tokens = tokenizer.encode(prompt)[-max(run.seq_len // 2, 1) :]
    if not len(tokens):
        tokens = np.asarray([tokenizer.eos])
    new = []
    room = min(SAMPLE_TOKENS, run.config.max_length - len(tokens))
    model = trained_model(run, state)
    for token_B in Stream(
        model, np.asarray(tokens, np.int32)[None], max_new_tokens=room, temperature=0.7,
        key=jax.random.key(seed),
    ):
        if int(token_B[0]) == tokenizer.eos:
            break
        new.append(int(token_B[0]))
    return tokenizer.decode(new)


def write_report_if_possible(directory: RunDirectory) -> Path | None:
    """report.html, or None where matplotlib is not installed."""
    try:
        from experiments.report import write_report

        return write_report(directory.path)
    except ImportError:
        return None
