"""`sample`: streams text from a trained run or from released weights."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from deepseek_jax.generate import Stream
from deepseek_jax.latent_cache import check_format
from deepseek_jax.sampling import Sampling
from experiments.devices import MeshArgs, devices_of
from experiments.models import chat_prompt, load_model, run_of
from experiments.tables import write_json


@dataclass(frozen=True)
class SampleArgs(MeshArgs):
    """Continue a prompt, token by token, with the model of a run or of a checkpoint folder.

    A checkpoint with a chat template is asked the prompt as a question, unless --raw.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a run, or a folder of released weights."""
    prompt: str = "def "
    """Text to continue, or question to answer."""
    max_new_tokens: int | None = None
    """Stop after so many tokens, or at the end of the text; 200, or what there is room for."""
    temperature: float = 0.7
    """0 always takes the most likely token."""
    top_k: int | None = None
    """Draw from so many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities reach this."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the most likely one."""
    draft: bool = False
    """Have the MTP modules draft tokens, and say how many held."""
    cache: str | None = None
    """Format of the cache: bf16, fp8 (tiles) or fp32; by default that of activations."""
    precision: str | None = None
    """Of released weights: fp32, bf16 or fp8; by default weights and all else in BF16."""
    raw: bool = False
    """Continue the prompt as it is, chat template or not."""
    seed: int = 0
    """Seed of the draws."""
    step: int | None = None
    """Checkpoint of a run to use; the last one by default."""
    json: Path | None = None
    """Also write prompt, text and tokens to this file."""


def sample(args: SampleArgs) -> None:
    """Prints the prompt and its continuation as it is made."""
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must be at least 0, at most {2**32 - 1}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError("--prompt is not UTF-8: write it in UTF-8") from error
    run = run_of(args.run)
    if args.draft and not run.config.num_mtp:
        raise ValueError(f"--draft needs a model with MTP modules, and {args.run} has none")
    devices = devices_of(args, run)
    # Before the weights are read; JAX may look for devices from here on.
    Sampling.of(args.temperature, args.top_k, args.top_p, args.min_p)
    if args.cache is not None:
        check_format(args.cache)
    with devices.scope():
        continue_prompt(args, devices.mesh)


def continue_prompt(args: SampleArgs, mesh: jax.sharding.Mesh | None) -> None:
    loaded = load_model(args.run, step=args.step, precision=args.precision, mesh=mesh)
    tokenizer, config = loaded.tokenizer, loaded.model.config
    if loaded.chat is not None and not args.raw:
        text = chat_prompt(loaded.chat, [{"role": "user", "content": args.prompt}])
        tokens = [int(t) for t in tokenizer.encode(text, special=True)]
    else:
        tokens = [*loaded.begin, *(int(t) for t in tokenizer.encode(args.prompt))]
        tokens = tokens or [tokenizer.eos]
    if len(tokens) >= config.max_length:
        raise ValueError(f"a prompt of {len(tokens)} tokens leaves no room for another in "
                         f"max_length={config.max_length}: shorten it")  # fmt: skip
    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = min(200, config.max_length - len(tokens))
    began = time.perf_counter()
    texts = Stream(
        loaded.model,
        np.asarray([tokens], np.int32),
        max_new_tokens=max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop=loaded.stop,
        draft=args.draft,
        cache_format=args.cache,
        key=jax.random.key(args.seed),
    )
    new: list[int] = []
    shown = ""
    sys.stdout.write(args.prompt)
    for token_B in texts:
        if int(token_B[0]) in loaded.stop:
            break
        new.append(int(token_B[0]))
        # A character may take several tokens: show only what can no longer change.
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print(tokenizer.decode(new)[len(shown) :])
    if args.draft:
        print_drafting(texts, time.perf_counter() - began)
    if args.json is not None:
        write_json(args.json, {"prompt": args.prompt, "text": tokenizer.decode(new),
                               "tokens": new})


def print_drafting(texts: Stream, seconds: float) -> None:
    """How many drafts held and what that gave; compiling is in the seconds."""
    report = texts.report
    print(
        f"drafts: {report.acceptance:.1%} accepted, {report.tokens_per_step:.2f} tokens a step, "
        f"{report.tokens / seconds:.1f} tokens/s with compiling; cache {report.cache_bytes:,} bytes"
    )
