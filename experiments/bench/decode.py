"""`bench decode`: tokens/s of generation beside the memory's limit, and beside transformers."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx

from deepseek_jax import configs
from deepseek_jax.config import Precision
from deepseek_jax.counts import param_counts
from deepseek_jax.generate import Text
from deepseek_jax.huggingface import save_huggingface
from deepseek_jax.linear import DTYPES
from deepseek_jax.model import Model
from experiments.recipes import hundred_million_config, peer_config
from experiments.tables import print_table
from sharding.hardware import ACCELERATORS

# Weights as they are multiplied; "bf16" trains on FP32 masters, which decoding does not need.
PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(weights="bf16", activations="bf16", matmul="bf16"),
}


MODELS = {
    "hundred_million": hundred_million_config,
    "peer": peer_config,
    **configs.NAMED,
}


@dataclass(frozen=True)
class BenchDecodeArgs:
    """Time generation from random weights: greedy, every text as long as asked for."""

    model: Annotated[str, tyro.conf.Positional] = "hundred_million"
    """hundred_million, peer, or a named configuration."""
    batch: tuple[int, ...] = (1, 16)
    """Texts at once."""
    precision: tuple[str, ...] = ("fp32", "bf16")
    """fp32 or bf16: of weights, activations and products. A CPU multiplies BF16 weights widened to
    FP32, which is faster there; the column `products` says what they ran in."""
    prompt: int = 32
    """Tokens of each prompt."""
    new: int = 256
    """New tokens of each text."""
    draft: bool = False
    """Draft with the MTP modules (random ones accept next to nothing)."""
    peer: bool = False
    """Also time transformers with the same weights on this CPU (extra: parity)."""
    repeats: int = 3
    """Generations timed; the fastest is reported."""
    json: Path | None = None
    """Also write the table to this file."""


def bench_decode(args: BenchDecodeArgs) -> None:
    """Prints a row for each batch and precision."""
    if args.model.replace("-", "_") not in MODELS:
        raise ValueError(f"unknown model {args.model!r}: use one of {', '.join(MODELS)}")
    for precision in args.precision:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: use {', '.join(PRECISIONS)}")
    config = MODELS[args.model.replace("-", "_")]()
    rows = []
    for precision in args.precision:
        make = lambda precision=precision: Model(
            config, precision=PRECISIONS[precision], rngs=nnx.Rngs(0)
        )
        model = nnx.jit(make)()
        for batch in args.batch:
            prompt_BT = np.random.default_rng(0).integers(
                0, config.vocab_size, (batch, args.prompt)
            )
            rows.append(ours(args, model, precision, prompt_BT))
            print(rows[-1], flush=True)
        if args.peer:
            for row in rows[-len(args.batch) :]:
                row |= transformers_figures(args, model, precision, row)
                print(row, flush=True)
    print_table(rows, title=f"bench decode {args.model}", json_path=args.json)


def ours(args: BenchDecodeArgs, model: Model, precision: str, prompt_BT) -> dict[str, Any]:
    """Tokens/s of our generation and of the memory that must move."""
    whole, steps = [], []
    for _ in range(args.repeats + 1):
        began = time.perf_counter()
        text = Text(model, prompt_BT, max_new_tokens=args.new, draft=args.draft)
        jax.block_until_ready(text.state)
        read = time.perf_counter()
        text.advance()
        ended = time.perf_counter()
        whole.append(ended - began)
        steps.append(ended - read)
    report, fastest = text.report, min(whole[1:])
    B, decoding = prompt_BT.shape[0], min(steps[1:])
    row = {
        "device": jax.devices()[0].device_kind,
        "precision": precision,
        "products": text.model.precision.matmul,
        "batch": B,
        "tokens_per_second": B * args.new / fastest,
        "prompt_ms": 1e3 * (fastest - decoding),
        "ms_per_step": 1e3 * decoding / report.steps,
        "compile_seconds": whole[0] - fastest,
        "cache_bytes": report.cache_bytes,
    }
    moved = bytes_per_step(model, B, args.prompt + args.new // 2)
    row["bytes_per_step"] = moved
    for known in ACCELERATORS.values():
        # A CPU's bandwidth is not known.
        if known.platform == "cpu" or not row["device"].startswith(known.kind):
            continue
        row["limit_tokens_per_second"] = B * known.memory_bandwidth / moved
        # Of the steps: the limit leaves out the prompts.
        row["share_of_limit"] = B * args.new / decoding / row["limit_tokens_per_second"]
    return row


def bytes_per_step(model: Model, batch: int, length: int) -> float:
    """What a step must read: every weight that some token uses, and the caches of all texts.

    Of the experts of a layer, as many as `batch` tokens choose on average at even load.
    """
    config = model.config
    size = DTYPES[model.precision.weights](0).dtype.itemsize
    counts = param_counts(config)
    expert = 3 * config.model_dim * config.expert_ffn_dim
    chosen = config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** batch)
    always = counts.active - config.num_moe_layers * config.experts_per_token * expert
    weights = always + config.num_moe_layers * chosen * expert
    cache = batch * length * config.num_layers * config.cache_dim
    return float(size * (weights + cache))


def transformers_figures(args: BenchDecodeArgs, model: Model, precision: str, row):
    """Tokens/s of transformers' generate, and whether it finds the same tokens (FP32)."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    prompt_BT = np.random.default_rng(0).integers(
        0, model.config.vocab_size, (row["batch"], args.prompt)
    )
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(model, Path(folder) / "model", format=precision)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        ).eval()
    theirs.generation_config.eos_token_id = None
    prompt = torch.from_numpy(prompt_BT)
    generate = lambda: theirs.generate(
        prompt, max_new_tokens=args.new, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    seconds = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        found = generate()
        seconds.append(time.perf_counter() - began)
    text = Text(model, prompt_BT, max_new_tokens=args.new)
    tokens = text.new_tokens(*text.advance()[:2])
    theirs_per_second = row["batch"] * args.new / min(seconds)
    return {
        "transformers_tokens_per_second": theirs_per_second,
        "speed_up": row["tokens_per_second"] / theirs_per_second,
        "same_tokens": float((found[:, args.prompt :].numpy() == tokens).mean()),
    }
