"""`bench combine`: what the format of experts' results costs in loss and saves in bytes."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deepseek_jax.config import COMBINE, Run
from deepseek_jax.experts import results_format
from deepseek_jax.linear import DTYPES
from deepseek_jax.training import TrainState, init_state
from experiments.data import TokenShards, prefetch, prepare
from experiments.devices import Devices, MeshArgs, devices_of
from experiments.provenance import provenance
from experiments.recipes import recipe
from experiments.tables import print_table, write_json
from experiments.train import CompiledSteps, batch_source, make_batch, plan_batches


@dataclass(frozen=True)
class BenchCombineArgs(MeshArgs):
    """Train a recipe with each format of combine, from the same weights on the same batches.

    Experts lie on several devices: all of this process, unless --mesh says otherwise. A laptop
    lends some of its processor with XLA_FLAGS=--xla_force_host_platform_device_count=2.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "tiny"
    """Name of the recipe."""
    steps: int = 200
    """Steps of each run."""
    last: int = 20
    """Steps at the end whose mean loss is compared."""
    data: tuple[str, ...] = ()
    """Files or folders to train on; the recipe's by default."""
    json: Path | None = None
    """Also write the table to this file."""


def bench_combine(args: BenchCombineArgs) -> None:
    """Trains, and prints a row for each format."""
    if not 1 <= args.last <= args.steps:
        raise ValueError(f"--last {args.last} must be from 1 to --steps {args.steps}")
    run = recipe(args.recipe)(args.steps)
    run = dataclasses.replace(run, data=args.data or run.data)
    if jax.device_count() == 1:
        raise ValueError(
            "combine needs two devices or more, this machine has one: on a CPU set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=2"
        )
    if args.mesh is None:
        args = dataclasses.replace(args, mesh=f"expert={jax.device_count()}")
    devices = devices_of(args, run, batch=run.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        shards, _ = prepare(
            run.data,
            directory=Path(folder) / "data",
            vocab_size=run.config.vocab_size,
            tokenizer_file=run.tokenizer,
        )
        # Made once: compiling it takes longer than many steps.
        start = init_state(run, devices.mesh)
        losses = {name: train(run, name, start, shards, devices) for name in COMBINE}
    rows = [row(run, name, losses, args.last) for name in COMBINE]
    title = f"{args.recipe}, {args.steps} steps, {devices}"
    print_table(rows, title=title)
    if args.json is not None:
        write_json(args.json, {**provenance(), "recipe": args.recipe, "steps": args.steps,
                               "devices": str(devices), "rows": rows})


def train(
    run: Run, combine: str, start: TrainState, shards: TokenShards, devices: Devices
) -> np.ndarray:
    """The loss of every step."""
    run = dataclasses.replace(run, precision=dataclasses.replace(run.precision, combine=combine))
    # A copy: the step takes the memory of the state it is given.
    state, source = jax.tree.map(jnp.copy, start), batch_source(run, shards)
    step_of, losses = CompiledSteps(run, state, devices), []
    make = lambda plan: make_batch(run, source, *plan, mesh=devices.mesh)
    batches = prefetch(make, plan_batches(run, 0))
    try:
        for batch in batches:
            state, metrics = step_of(state, batch)
            losses.append(float(metrics["loss"]))
    finally:
        batches.close()
    print(f"{combine}: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    return np.asarray(losses)


def row(run: Run, name: str, losses: dict[str, np.ndarray], last: int) -> dict[str, Any]:
    """A line of the table."""
    loss, plain = (losses[key][-last:].mean() for key in (name, "bf16"))
    sent, whole = token_bytes(run, name), token_bytes(run, "bf16")
    return {
        "combine": name if name != "bf16" else f"as activations, {run.precision.activations}",
        "bytes a row": sent,
        "bytes %": 100 * sent / whole,
        f"loss, last {last}": loss,
        "gap %": 100 * (loss / plain - 1),
    }


def token_bytes(run: Run, combine: str) -> int:
    """Bytes of one row of results on its way."""
    sent: list[jax.ShapeDtypeStruct] = []

    def exchange(array):
        sent.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
        return array

    y_MD = jax.ShapeDtypeStruct((1, run.config.model_dim), DTYPES[run.precision.activations])
    jax.eval_shape(lambda y: results_format(combine)(y, exchange), y_MD)
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in sent)
