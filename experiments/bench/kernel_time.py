"""Times of kernels on a GPU: by CUPTI for JAX and torch alike, with a cold L2, taking turns."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROUNDS = 30
# More than twice the L2 cache of a Hopper GPU (50 MiB).
FLUSHED_BYTES = 128 * 2**20


class Call(NamedTuple):
    """Work to time: `run` enqueues it, on torch's stream or on JAX's."""

    run: Callable[[], Any]
    torch: bool = False


def require_gpu(command: str, *, torch: bool) -> jax.Device:
    """The Hopper GPU of this machine, with torch beside it if asked; otherwise a ValueError."""
    # Torch allocates beside JAX; read when the backend starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu" or not any(n in device.device_kind for n in ("H100", "H200")):
        raise ValueError(
            f"{command} times kernels on a Hopper GPU (H100, H200); this machine has "
            f"{device.device_kind} ({device.platform})"
        )
    if torch and import_torch() is None:
        raise ValueError(
            f"{command} times torch's kernels beside ours, and torch with CUDA is not installed: "
            "install it, or leave its kernels out with --no-peers"
        )
    return device


def import_torch() -> Any:
    """torch if it is installed and sees the GPU, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def load_cupti() -> Any:
    """The profiler of kernels that comes with jax's Mosaic GPU."""
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext


class Timer:
    """Medians of kernel times in microseconds."""

    def __init__(self, *, torch: bool):
        count = FLUSHED_BYTES // 4
        ours, negate = jnp.ones(count, jnp.float32), jax.jit(jnp.negative)
        self._flush = {False: lambda: negate(ours)}
        self._torch = import_torch() if torch else None
        if self._torch is not None:
            theirs = self._torch.ones(count, device="cuda")
            self._flush[True] = lambda: self._torch.neg(theirs)
        # Kernels of the flush, to be left out of what a call took; empty where CUPTI sees nothing.
        self._names = {
            torch: {name for name, _ in self._record(flush, torch, 2)}
            for torch, flush in self._flush.items()
        }
        self.method = "CUPTI" if self._names[False] else "none"
        self.torch_method = "CUPTI" if self._names.get(True) else "events"

    def compare(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Median over 30 calls of each, one of each in turn, every other turn backwards.

        A GPU at its power limit slows down in the first tens of milliseconds of large products:
        of calls ten at a time, whichever came early most often would look faster, by up to a tenth.
        """
        order = [name for turn in range(ROUNDS) for name in list(calls)[:: (-1) ** turn]]
        taken: dict[str, list[float]] = {name: [] for name in calls}
        apart = [name for name in calls if calls[name].torch and self.torch_method == "events"]
        together = [name for name in order if name not in apart]
        spans = self._spans([calls[name] for name in together])
        if len(spans) == len(together):
            for name, microseconds in zip(together, spans, strict=True):
                taken[name].append(microseconds)
        else:
            apart = list(calls)
        for name in order:
            if name in apart:
                taken[name].append(self.measure(calls[name]))
        return {name: statistics.median(times) for name, times in taken.items()}

    def _spans(self, calls: Sequence[Call]) -> list[float]:
        """Microseconds between one flush and the next, for each call, in one recording."""
        cupti, flushes = load_cupti(), set().union(*self._names.values())
        cupti._cupti_init()
        try:
            for call in calls:
                self._flush[call.torch]()
                self._wait(call.torch, call.run())
        finally:
            records = cupti._cupti_get_timings(True) or []
        spans: list[float] = []
        for name, milliseconds in records:
            if name in flushes:
                spans.append(0.0)
            elif spans:
                spans[-1] += 1e3 * milliseconds
        return spans if all(spans) else []

    def measure(self, call: Call) -> float:
        """Microseconds of a call: all of its kernels, added up."""
        flush = self._flush[call.torch]

        def both():
            flush()
            return call.run()

        if not call.torch or self.torch_method == "CUPTI":
            records = self._record(both, call.torch, 1)
            kernels = [time for name, time in records if name not in self._names[call.torch]]
            if kernels:
                return 1e3 * sum(kernels)
            if not call.torch:
                raise RuntimeError("CUPTI saw no kernel of a call")
            self.torch_method = "events"
        return self._events(call.run, flush)

    def _record(self, run, torch, count) -> list[tuple[str, float]]:
        """Names and milliseconds of all kernels of so many runs, in order."""
        cupti = load_cupti()
        run()
        self._wait(torch, None)
        cupti._cupti_init()
        try:
            result = None
            for _ in range(count):
                result = run()
            self._wait(torch, result)
        finally:
            records = cupti._cupti_get_timings(True)
        return records or []

    def _wait(self, torch, result):
        if torch:
            self._torch.cuda.synchronize()
        else:
            jax.block_until_ready(result)

    def _events(self, run, flush) -> float:
        cuda = self._torch.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        run()
        flush()
        start.record()
        run()
        end.record()
        cuda.synchronize()
        return 1e3 * start.elapsed_time(end)
