"""`bench train`: tokens/s, TFLOP/s and memory of a recipe's train step on random tokens."""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from deepseek_jax.config import Precision, Run, Schedule
from deepseek_jax.counts import param_counts, train_flops_per_token
from deepseek_jax.training import init_state, make_train_step
from experiments.bench.kernels import kernel_table
from experiments.devices import MeshArgs, devices_of
from experiments.recipes import recipe
from experiments.tables import print_table
from experiments.train import planned_bytes
from sharding.hardware import peak_flops


@dataclass(frozen=True)
class BenchTrainArgs(MeshArgs):
    """Time the train step of a recipe: the model, its backward pass and the optimizer."""

    recipe: Annotated[str, tyro.conf.Positional] = "peer"
    """Name of the recipe."""
    precision: str | None = None
    """fp32, bf16 or fp8; the recipe's by default."""
    batch: int | None = None
    """Sequences per step; the recipe's micro-batch by default."""
    remat: str | None = None
    """none, paper, attention or full; the recipe's by default."""
    mtp: int | None = None
    """Depth of multi-token prediction; the recipe's by default."""
    steps: int = 8
    """Steps timed; the median is reported."""
    profile: bool = False
    """Also print where the time goes, by kernel (GPU)."""
    json: Path | None = None
    """Also write the table to this file."""


def bench_train(args: BenchTrainArgs) -> None:
    """Compiles the step, times it and prints one row."""
    run = benchmark_run(args.recipe, precision=args.precision, remat=args.remat,
                        batch=args.batch, mtp=args.mtp)
    devices = devices_of(args, run, batch=run.micro_batch)
    batch = random_batch(run)
    state = init_state(run, devices.mesh)
    began = time.perf_counter()
    step = make_train_step(run, *devices).lower(state, batch).compile()
    compiled_in = time.perf_counter() - began
    for _ in range(2):
        state, metrics = step(state, batch)
    jax.block_until_ready(state)
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    if int(metrics["lost"]):
        raise ValueError(f"dispatch had no room at {devices.scheme.room:g} times an even load")
    measured = figures(run, statistics.median(seconds), compiled_in, planned_bytes(step),
                       devices.size)
    row = {"devices": str(devices), **measured}
    row["loss"] = float(metrics["loss"])
    print_table([row], title=f"bench train {args.recipe}", json_path=args.json)
    if args.profile:
        print_table(kernel_table(lambda: jax.block_until_ready(step(state, batch))),
                    title="one step by kernel")


def benchmark_run(
    name: str,
    *,
    precision: str | None = None,
    remat: str | None = None,
    batch: int | None = None,
    mtp: int | None = None,
) -> Run:
    """A recipe's run with what is given changed."""
    run = recipe(name)(None)
    if precision is not None:
        run = dataclasses.replace(run, precision=Precision.of(precision))
    if batch is not None:
        run = dataclasses.replace(run, micro_batch=batch, batch_size=Schedule.constant(batch))
    if remat is not None:
        run = dataclasses.replace(run, remat=remat)
    if mtp is not None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, num_mtp=mtp))
    return run


def random_batch(run: Run) -> dict[str, np.ndarray]:
    """One batch of uniformly drawn tokens."""
    accumulation = run.accumulation_at(0)
    shape = (accumulation, run.micro_batch, run.seq_len + 1)
    tokens = np.random.default_rng(run.seed).integers(0, run.config.vocab_size, shape)
    return {"tokens": tokens.astype(np.int32)}


def figures(
    run: Run, seconds: float, compiled_in: float, planned: int, num_devices: int = 1
) -> dict[str, Any]:
    """The row of a timed step: tokens/s of all devices, everything else of one.

    TFLOP/s count the causal triangle only (counts.py).
    """
    device = jax.devices()[0]
    tokens = run.accumulation_at(0) * run.micro_batch * run.seq_len
    flops = train_flops_per_token(run.config, run.seq_len, causal=True, mtp=True)
    flops *= tokens / num_devices
    peak = peak_flops(device.device_kind)
    counts = param_counts(run.config)
    stats = device.memory_stats() or {}
    measured = stats.get("peak_bytes_in_use")
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "precision": run.precision.matmul,
        "remat": run.remat,
        "parameters": counts.total,
        "active": counts.active,
        "batch": f"{run.micro_batch} x {run.seq_len}",
        "ms": 1000 * seconds,
        "tokens/s": tokens / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "MFU": flops / seconds / peak if peak else None,
        "GiB planned": planned / 2**30,
        "GiB measured": measured / 2**30 if measured else None,
        "compile s": compiled_in,
    }
