"""The cost model over all legal setups of a run on a cluster: predictions, what fits, the best."""

from collections.abc import Iterable
from typing import NamedTuple

from deepseek_jax.block import REMAT
from deepseek_jax.config import Run
from experiments.planning.memory import memory
from experiments.planning.setup import SEQUENCES, Setup, check_sequences, setups
from experiments.planning.traffic import step_transfers
from experiments.planning.work import step_work
from sharding.cost import Prediction, Reached, predict
from sharding.hardware import Cluster

# Of a device's memory, what a setup may need by formula to be worth compiling.
FILL = 0.92
# What programs reach of the hardware's figures. CPU devices share their cores and memory, and
# nothing runs behind anything there.
REACHED = {
    "gpu": Reached(),
    "tpu": Reached(products=0.6, fp8=0.6, core=0.6),
    "cpu": Reached(products=1.0, fp8=1.0, core=1.0, memory=1.0, network=1.0, overlap=0.0),
}


class Candidate(NamedTuple):
    """A setup with what the formulas say of it."""

    setup: Setup
    bytes: float  # needed on a device
    seconds: float  # of a step
    exposed: float  # of these, communication

    @property
    def fits(self) -> bool:
        return self.bytes <= FILL * self.setup.cluster.accelerator.memory


def prediction(setup: Setup, reached: Reached | None = None) -> Prediction:
    """Seconds of a step by part."""
    hardware = setup.cluster.accelerator
    reached = reached or REACHED[hardware.platform]
    return predict(step_work(setup), step_transfers(setup), setup.mesh, hardware, reached)


def candidate(setup: Setup, reached: Reached | None = None) -> Candidate:
    """A setup, costed."""
    expected = prediction(setup, reached)
    return Candidate(setup, memory(setup).total, expected.seconds, expected.exposed)


def candidates(run: Run, cluster: Cluster, reached: Reached | None = None) -> list[Candidate]:
    """Every legal setup, costed; those that fit come first, fast before slow, small before big."""
    return ordered(candidate(setup, reached) for setup in setups(run, cluster))


def ordered(found: Iterable[Candidate]) -> list[Candidate]:
    return sorted(found, key=lambda c: (not c.fits, c.seconds, c.bytes))


def best_setup(
    run: Run, cluster: Cluster, *, sequences: int | None = None, remat: str | None = None
) -> Setup:
    """The fastest setup that fits, of those with the given micro-batch and remat policy.

    Raises:
      ValueError: none fits.
    """
    if remat is not None and remat not in REMAT:
        raise ValueError(f"remat={remat!r} must be one of {', '.join(REMAT)}")
    if sequences is not None and sequences not in SEQUENCES:
        check_sequences(sequences)
        tried = ", ".join(map(str, SEQUENCES))
        raise ValueError(
            f"without a mesh {tried} sequences are tried, not {sequences}: for others name a mesh"
        )
    found = [
        c for c in candidates(run, cluster)
        if (sequences is None or c.setup.sequences == sequences)
        and (remat is None or c.setup.run.remat == remat)
    ]  # fmt: skip
    if not found:
        with_ = "" if sequences is None else f" and {sequences} sequences a micro-batch"
        raise ValueError(f"{cluster.name} has no legal mesh for this model{with_}")
    if not found[0].fits:
        least = min(found, key=lambda c: c.bytes)
        has = cluster.accelerator.memory / 2**30
        raise ValueError(
            f"nothing fits {cluster.name}: {least.setup.name} needs least, about "
            f"{least.bytes / 2**30:.0f} GiB, and a device has {has:.0f} GiB"
        )
    return found[0].setup
