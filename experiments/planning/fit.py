"""Constants of the cost model from measured steps, on a few meshes that are named beforehand."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.planning.setup import Setup
from experiments.planning.traffic import step_transfers
from experiments.planning.work import step_work
from sharding.cost import Reached, Terms, transfer_terms, work_terms

# The form: seconds = products / a + memory / b + network / c + messages * d, each at the figures of
# sharding/hardware.py, nothing hidden behind anything. The terms of CPU devices are what their
# process does (work.block_bytes, cost.transfer_terms): all of them share its cores and memory.
# The constants are fitted on these meshes of 8 devices and judged on the others.
FITTED = (
    {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1},
    {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1},
    {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1},
    {"data": 1, "fsdp": 1, "expert": 1, "tensor": 8},
    {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1},
)


def is_fitted(mesh: Mapping[str, int]) -> bool:
    """Whether the mesh is one that constants may be fitted on."""
    return dict(mesh) in FITTED


def terms(setup: Setup) -> Terms:
    """Seconds of a step at the hardware's figures, by what limits them."""
    hardware, total = setup.cluster.accelerator, Terms()
    for work in step_work(setup):
        total = total + work_terms(work, hardware)
    for transfer in step_transfers(setup):
        total = total + transfer_terms(transfer, setup.mesh, hardware)
    return total


def fit(setups: Sequence[Setup], seconds: Sequence[float]) -> Reached:
    """The non-negative constants that come nearest to measured steps, relative to each."""
    from scipy.optimize import nnls

    seconds = np.asarray(seconds, np.float64)
    found = [terms(setup) for setup in setups]
    # A CPU multiplies everything alike.
    rows = np.array(
        [(t.products + t.fp8 + t.core, t.memory, t.network, t.messages) for t in found]
    )
    rows /= seconds[:, None]
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    fitted, _ = nnls(rows / scale, np.ones(len(rows)))
    *times, message = fitted / scale
    products, memory, network = (1 / max(time, 1e-12) for time in times)
    return Reached(products=products, fp8=products, core=products, memory=memory,
                   network=network, message=message, overlap=0.0)  # fmt: skip
