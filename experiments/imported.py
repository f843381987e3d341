"""Training on from released weights: their sizes in a recipe's run, their numbers in its state."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepseek_jax.config import Run
from deepseek_jax.huggingface import load_huggingface
from deepseek_jax.huggingface_checkpoint import open_checkpoint
from deepseek_jax.training import TrainState, init_state, split, state_shardings


def imported_run(run: Run, path: Path) -> Run:
    """The run with the sizes of a checkpoint, and its tokenizer where the run names none."""
    if (path / "checkpoints").is_dir() and (path / "metrics.jsonl").exists():
        raise ValueError(f"--from {path} is a run: `convert {path} FOLDER` makes weights of it")
    config = dataclasses.replace(open_checkpoint(path).config, init_std=run.config.init_std)
    tokenizer = path / "tokenizer.json"
    if run.tokenizer is None and tokenizer.is_file():
        run = dataclasses.replace(run, tokenizer=str(tokenizer))
    # A recipe's sequences may be longer than the model reads.
    return dataclasses.replace(run, config=config, seq_len=min(run.seq_len, config.max_length))


def imported_state(run: Run, path: Path, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step with the weights and routing biases of a checkpoint."""
    params, biases = split(load_huggingface(path, precision="fp32", mesh=mesh))
    fields = ("params", "biases", "ema")
    # Random weights are not made: nothing asks for them.
    rest = lambda: dataclasses.replace(init_state(run), **dict.fromkeys(fields))
    if mesh is None:
        state = jax.jit(rest)()
    else:
        where = dataclasses.replace(state_shardings(run, mesh), **dict.fromkeys(fields))
        state = jax.jit(rest, out_shardings=where)()
    ema = jax.tree.map(jnp.copy, params) if run.ema_decay is not None else None
    return dataclasses.replace(state, params=params, biases=biases, ema=ema)
