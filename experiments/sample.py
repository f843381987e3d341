"""`sample`: streams text from a trained run."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from deepseek_jax.generate import check_prompt, stream
from experiments.devices import MeshArgs, devices_of
from experiments.eval import load_run, run_tokenizer, trained_model
from experiments.run_directory import RunDirectory
from experiments.tables import write_json


@dataclass(frozen=True)
class SampleArgs(MeshArgs):
    """Continue a prompt with a run's model, token by token."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    prompt: str = "def "
    """Text to continue."""
    max_new_tokens: int | None = None
    """Stop after so many tokens, or at the end of the document; 200 if the model has room."""
    temperature: float = 0.7
    """0 always takes the most likely token."""
    seed: int = 0
    """Seed of the draws."""
    step: int | None = None
    """Checkpoint to use; the last one by default."""
    json: Path | None = None
    """Also write prompt, text and tokens to this file."""


def sample(args: SampleArgs) -> None:
    """Prints the prompt and its continuation as it is made."""
    directory = RunDirectory(args.run)
    devices = devices_of(args, directory.read_run())
    run, state = load_run(directory, step=args.step, mesh=devices.mesh)
    tokenizer = run_tokenizer(directory)
    tokens = [int(t) for t in tokenizer.encode(args.prompt)] or [tokenizer.eos]
    prompt_BT, key = np.asarray([tokens], np.int32), jax.random.key(args.seed)
    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(1, min(200, run.config.max_length - len(tokens)))
    check_prompt(run.config, prompt_BT, max_new_tokens, args.temperature, key)
    new: list[int] = []
    shown = ""
    sys.stdout.write(args.prompt)
    with devices.scope():
        for token_B in stream(
            trained_model(run, state),
            prompt_BT,
            max_new_tokens=max_new_tokens,
            temperature=args.temperature,
            key=key,
        ):
            if int(token_B[0]) == tokenizer.eos:
                break
            new.append(int(token_B[0]))
            # A character may take several tokens: show only what can no longer change.
            text = tokenizer.decode(new)
            if not text.endswith("\ufffd"):
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
    print(tokenizer.decode(new)[len(shown) :])
    if args.json is not None:
        write_json(args.json, {"prompt": args.prompt, "text": tokenizer.decode(new),
                               "tokens": new})
