"""The training loop: batches in, metrics and checkpoints out, stopped and resumed exactly."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.checkpoint import Checkpoints
from deepseek_jax.config import ModelConfig, Run
from deepseek_jax.counts import train_flops_per_token
from deepseek_jax.training import TrainState, init_state, make_train_step, parameter_names
from experiments.data.batches import BatchSource, prefetch
from experiments.data.shards import TokenShards
from experiments.devices import ONE_DEVICE, Devices, place_batch
from experiments.display import TrainingDisplay
from experiments.events import Events
from experiments.imported import imported_state
from experiments.processes import asked_to_stop
from experiments.run_directory import MetricsLog, RunDirectory
from sharding.hardware import peak_flops

# Elements of expert load written per step: large models write theirs every so many steps only.
LOAD_ELEMENTS = 4096


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped after step {step}")
        self.signum, self.step = signum, step


def first_state(
    run: Run,
    checkpoints: Checkpoints,
    mesh: Mesh | None = None,
    *,
    imported: str | None = None,
) -> TrainState:
    """The state of the last complete checkpoint, or that of the start.

    Args:
      imported: a folder of released weights to start from.
    """
    if checkpoints.latest is None:
        if imported is not None:
            return imported_state(run, Path(imported), mesh)
        return init_state(run, mesh)
    if checkpoints.latest > run.steps:
        raise ValueError(
            f"--steps {run.steps} must be at least the {checkpoints.latest} steps already done"
        )
    return checkpoints.restore(run, mesh)


def train(
    run: Run,
    state: TrainState,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    source: BatchSource,
    display: TrainingDisplay,
    devices: Devices,
    *,
    record: dict[str, Any],
    bytes_per_token: float,
    header: list[tuple[str, Any]],
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains from the given state, which is donated, to run.steps; closes the checkpoints.

    The record becomes config.json when the step is compiled: what cannot run leaves no run.

    Raises:
      Stopped: after SIGINT or SIGTERM, with the state saved.
      ValueError: max_skipped steps in a row were not finite; names the first bad tensor.
    """
    begin = done = int(state.step)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        if begin == run.steps:
            directory.write_config(record)
            display.start(header)
            stack.callback(display.stop)
            display.say(f"all {run.steps} steps are done")
            return state
        names = parameter_names(state.params)
        make = lambda plan: make_batch(run, source, *plan, devices.mesh)
        batches = prefetch(make, plan_batches(run, begin))
        stack.callback(batches.close)
        step_of = CompiledSteps(run, state, devices, display.say)
        first = next(batches)
        # A batch that grows needs more later, which is to be known before there is work to lose.
        largest = run.accumulation_at(run.position_at(run.steps - 1) * run.seq_len)
        memory = max(step_of.memory(first), step_of.memory(first, largest))
        directory.write_config(record)
        directory.forget_summary()  # of fewer steps
        display.start([*header, ("memory", f"{memory / 2**30:.2f} GiB planned for a step")])
        stack.callback(display.stop)
        log = MetricsLog(directory.metrics, resume_step=begin)
        stack.callback(log.close)
        events = Events(directory.events, first_step=begin + 1)
        stack.callback(events.close)
        tracing = stack.enter_context(contextlib.ExitStack())
        alone = jax.process_count() == 1
        # With several processes the runtime takes the signals, and all stop after the same step.
        signals = stack.enter_context(StopSignals()) if alone else StopSignals()
        measure = Measure(run, bytes_per_token, devices.size)
        pending = None  # metrics of the running step, read while the next one is under way
        for batch in chain(first, batches):
            if profile is not None and done == profile[0]:
                tracing.enter_context(jax.profiler.trace(str(directory.path / "profile")))
            state, metrics = step_of(state, batch)
            done += 1
            if profile is not None and done == profile[1]:
                jax.block_until_ready(state)
                tracing.close()
            if pending is not None:
                report(pending, measure, log, events, display, run, names)
            pending = (done, batch["tokens"].shape, metrics)
            if not alone and asked_to_stop(done):
                signals.received = signal.SIGTERM
            stop = signals.received
            if stop or done % run.checkpoint_every == 0 or done == run.steps:
                report(pending, measure, log, events, display, run, names)
                pending = None
                checkpoints.save(done, state)
            if stop:
                break
        checkpoints.wait()
        if signals.received:
            raise Stopped(signals.received, done)
    return state


def batch_source(run: Run, shards: TokenShards) -> BatchSource:
    """The training sequences of a run."""
    return BatchSource(
        shards,
        seq_len=run.seq_len,
        seed=run.seed,
        fim_rate=run.fim_rate,
        segments=run.mask_documents,
    )


def plan_batches(run: Run, begin: int) -> Iterator[tuple[int, int]]:
    """(first sequence, micro-batches) of every step from `begin` on."""
    position = run.position_at(begin)
    for _ in range(begin, run.steps):
        accumulation = run.accumulation_at(position * run.seq_len)
        yield position, accumulation
        position += accumulation * run.micro_batch


def make_batch(
    run: Run, source: BatchSource, position: int, accumulation: int, mesh: Mesh | None = None
) -> dict[str, np.ndarray | jax.Array]:
    """The batch of a step, [accumulation, B, T + 1]; sequences are taken in order."""
    shape = (accumulation, run.micro_batch, run.seq_len + 1)
    return place_batch(
        lambda first, count: source.sequences(position + first, count), shape, mesh
    )


class CompiledSteps:
    """The train step, compiled once for each number of micro-batches and each room of dispatch."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        devices: Devices = ONE_DEVICE,
        say: Callable[[str], None] = print,
    ):
        self._run, self._mesh, self._scheme, self._say = run, *devices, say
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        self._compiled: dict[tuple, Any] = {}

    def _for(self, batch):
        key = (*batch, batch["tokens"].shape, self._scheme.room)
        if key not in self._compiled:
            step = make_train_step(self._run, self._mesh, self._scheme)
            self._compiled[key] = step.lower(self._state, batch).compile()
        return self._compiled[key]

    def __call__(self, state: TrainState, batch):
        """The state and metrics after a step. One that lost tokens is done again with more room.

        Only bounded buffers are asked whether they sufficed: the answer is waited for.
        """
        state, metrics = self._for(batch)(state, batch)
        while self._scheme.room is not None and (lost := int(metrics["lost"])):
            room = 2.0 ** (math.floor(math.log2(self._scheme.room)) + 1)
            self._say(
                f"dispatch had no room for {lost:,} choices of experts: the same batch runs again "
                f"with buffers for {room:g} times an even load instead of {self._scheme.room:g}"
            )
            self._scheme = replace(self._scheme, room=room)
            state, metrics = self._for(batch)(state, batch)
        return state, metrics

    def memory(self, batch, accumulation: int | None = None) -> int:
        """Bytes of device memory that the step needs: its state, batch and intermediate values.

        Args:
          accumulation: of so many micro-batches like those of the batch.
        """
        if accumulation is not None:
            like = lambda x: jax.ShapeDtypeStruct(
                (accumulation, *x.shape[1:]), x.dtype, sharding=getattr(x, "sharding", None)
            )
            batch = {name: like(x) for name, x in batch.items()}
        return planned_bytes(self._for(batch))


def planned_bytes(compiled) -> int:
    """Bytes a compiled program holds at once on a device, donated buffers counted once."""
    sizes = compiled.memory_analysis()
    total = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )
    return int(total)


def report(pending, measure, log, events, display, run: Run, names: list[str]) -> None:
    """Writes a finished step everywhere, and stops a run whose steps are no longer finite."""
    step, shape, metrics = pending
    metrics = jax.device_get(metrics)
    entry = measure.entry(step, shape, metrics)
    log.write(entry)
    display.update(entry)
    finite = lambda value: isinstance(value, float) and math.isfinite(value)
    events.write(step, {name: value for name, value in entry.items() if finite(value)})
    if entry["skipped_in_row"] >= run.max_skipped:
        bad = int(metrics["bad_tensor"])
        where = f"the gradient of {names[bad]}" if bad >= 0 else "the loss"
        raise ValueError(
            f"{run.max_skipped} steps in a row were not finite, last at step {step}: {where} is "
            "the first that is not; lower the learning rate, or look at the data of these steps"
        )


class Measure:
    """Turns the device's metrics of a step into the line that is logged; its clock starts now."""

    def __init__(self, run: Run, bytes_per_token: float, num_devices: int = 1):
        self._bytes_per_token = bytes_per_token
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * num_devices
        self._flops = {
            name: train_flops_per_token(run.config, run.seq_len, causal=causal, mtp=True)
            for name, causal in (("mfu_causal", True), ("mfu_full", False))
        }
        self._last = time.perf_counter()

    def entry(self, step: int, shape: tuple[int, ...], metrics: dict[str, Any]) -> dict[str, Any]:
        """Scalars of the step, expert load over its mean, and how fast it went."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        counts_LE = metrics.pop("expert_counts_LE").astype(np.float64)
        load_LE = counts_LE / np.maximum(counts_LE.mean(axis=-1, keepdims=True), 1e-9)
        entry = {"step": step}
        logged = set(metrics) - {"bad_tensor", "lost"}
        entry |= {name: metrics[name].item() for name in metrics if name in logged}
        entry["bits_per_byte"] = entry["loss"] / math.log(2) / self._bytes_per_token
        entry["busiest_over_mean"] = float(load_LE.max()) if load_LE.size else None
        if step % max(1, load_LE.size // LOAD_ELEMENTS) == 0:
            entry["expert_load_LE"] = np.round(load_LE, 4).tolist()
        rate = shape[0] * shape[1] * (shape[2] - 1) / seconds
        entry |= {"seconds": seconds, "tokens_per_second": rate}
        for name, flops in self._flops.items():
            entry[name] = rate * flops / self._peak if self._peak else None
        return entry


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one kills as usual."""

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum, frame) -> None:
        self.received = signum
        signal.signal(signum, self._before[signum])

    def __exit__(self, *exception) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def chain(first, rest):
    yield first
    yield from rest


def model_summary(config: ModelConfig) -> str:
    """The sizes of a model in a few words."""
    experts = f"{config.num_experts} experts, {config.experts_per_token} a token"
    return (
        f"{config.num_layers} layers ({config.num_dense_layers} dense), width "
        f"{config.model_dim}, {experts}, MTP depth {config.num_mtp}"
    )
