"""`eval`: how well a trained model predicts text, in bits per byte with every byte scored."""

import contextlib
import functools
import gzip
import lzma
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from deepseek_jax.checkpoint import Checkpoints
from deepseek_jax.config import Run
from deepseek_jax.loss import cross_entropy
from deepseek_jax.model import Model
from deepseek_jax.training import TrainState, join
from experiments.data import (
    Tokenizer,
    TokenShards,
    TokenSplit,
    ValidationBatches,
    load_corpus,
    load_tokenizer,
    open_shards,
    tokenize,
)
from experiments.devices import MeshArgs, devices_of
from experiments.run_directory import RunDirectory
from experiments.tables import print_table
from sharding.placement import Scheme, current_scheme, scope


@dataclass(frozen=True)
class EvalArgs(MeshArgs):
    """Bits per byte of a run's model on its validation text, or on other text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    data: tuple[str, ...] | None = None
    """Files or folders to score instead of the run's validation text."""
    batch_size: int = 16
    """Sequences scored at once."""
    step: int | None = None
    """Checkpoint to use; the last one by default."""
    json: Path | None = None
    """Also write the table to this file."""


def evaluate(args: EvalArgs) -> None:
    """Scores text with a checkpoint and prints the figures."""
    if args.data == ():
        raise ValueError("--data needs a path; without --data the validation text is scored")
    directory = RunDirectory(args.run)
    devices = devices_of(args, directory.read_run())
    run, state = load_run(directory, step=args.step, mesh=devices.mesh)
    with devices.scope(), scored_split(directory, args.data or ()) as (split, shards):
        row = score(run, state, shards, split, batch_size=args.batch_size)
    print_table([row], title=f"{args.run}, step {int(state.step)}", json_path=args.json)


def load_run(
    directory: RunDirectory, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Run, TrainState]:
    """The Run of a directory and the state of a checkpoint of it."""
    run = directory.read_run()
    if not directory.checkpoints.is_dir():
        raise ValueError(f"{directory.path} has no checkpoint yet: train it with launch --resume")
    checkpoints = Checkpoints(directory.checkpoints, keep=None)
    try:
        return run, checkpoints.restore(run, mesh, step=step)
    finally:
        checkpoints.close()


def trained_model(run: Run, state: TrainState) -> Model:
    """The model around the averaged parameters where the run keeps them, else the last ones."""
    return join(run, state.params if state.ema is None else state.ema, state.biases)


def run_tokenizer(directory: RunDirectory) -> Tokenizer:
    """The tokenizer that the run was trained with."""
    tokenizer = load_tokenizer(directory.tokenizer)
    check_hash(directory, "tokenizer", tokenizer.hash, directory.tokenizer)
    return tokenizer


def recorded_shards(directory: RunDirectory) -> TokenShards:
    """The tokens that the run was trained on."""
    paths = [directory.path / path for path in directory.read_config()["shards"]]
    shards = open_shards(paths)
    check_hash(directory, "tokenizer", shards.tokenizer_hash, paths[0])
    check_hash(directory, "corpus", shards.corpus_hash, paths[0])
    return shards


def check_hash(directory: RunDirectory, what: str, found: str, where: Path) -> None:
    """Raises a ValueError when a tokenizer or corpus is not the one of the checkpoint."""
    recorded = directory.read_config()[what]
    trained_with = recorded["hash"] if what == "corpus" else recorded
    if found != trained_with:
        raise ValueError(
            f"the {what} of {where} ({found[:12]}) does not match the checkpoint's "
            f"({trained_with[:12]}): put the run's own back"
        )


@contextlib.contextmanager
def scored_split(
    directory: RunDirectory, data: tuple[str, ...]
) -> Iterator[tuple[TokenSplit, TokenShards]]:
    """The tokens to score: all of `data`, or the validation split of the run."""
    if not data:
        shards = recorded_shards(directory)
        yield shards.validation, shards
        return
    field = directory.read_run().text_field
    corpus = load_corpus(data, field=field, validation_fraction=1.0)
    with tempfile.TemporaryDirectory() as folder:
        shards = tokenize(corpus, run_tokenizer(directory), Path(folder) / "data")
        yield shards.validation, shards


def score(
    run: Run, state: TrainState, shards: TokenShards, split: TokenSplit, *, batch_size: int
) -> dict[str, float | int]:
    """Nats per token and bits per byte of a split.

    Windows overlap by half, so that every token but the first few sees half a window of past.
    """
    model = trained_model(run, state)
    batches = ValidationBatches(
        split,
        eos=shards.eos,
        seq_len=run.seq_len,
        # A short text fills no more.
        batch_size=min(batch_size, max(1, -(-2 * split.num_tokens // run.seq_len))),
        context=run.seq_len // 2,
        segments=run.mask_documents,
    )
    total = 0.0
    for number in range(len(batches)):
        batch = batches[number]
        total += float(summed_loss(model, batch["tokens"], batch["mask"], batch.get("segments")))
    return {
        "bits_per_byte": total / math.log(2) / batches.num_bytes,
        "loss": total / batches.num_targets,
        "tokens": batches.num_targets,
        "bytes": batches.num_bytes,
    }


def summed_loss(model: Model, tokens_BS, mask_BT, segments_BS=None) -> jax.Array:
    """Sum of -log p over the targets where the mask is True, nats."""
    return _summed_loss(model, tokens_BS, mask_BT, segments_BS, scheme=current_scheme())


# The scheme is no part of what JAX tells traces apart by.
@functools.partial(jax.jit, static_argnames="scheme")
def _summed_loss(model, tokens_BS, mask_BT, segments_BS, *, scheme: Scheme) -> jax.Array:
    segments_BT = None if segments_BS is None else segments_BS[:, :-1]
    with scope(None, scheme):
        hidden_BTD, _ = model.hidden(tokens_BS[:, :-1], segments_BT=segments_BT)
    weight_BT = mask_BT.astype(jnp.float32)
    return cross_entropy(hidden_BTD, model.head_VD[...], tokens_BS[:, 1:], weight_BT)


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on the same bytes."""
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
