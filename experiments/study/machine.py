"""V3 on an H800 cluster whose figures can be changed: a training step, and the time per token.

The training step is that of V3's own plan, 16 stages x 64-way expert parallelism with DualPipe (V3
report, section 3): operations as `plan` counts them, dispatch and combine over nodes, the schedule
simulated. The time per output token is the paper's limit (ISCA section 2.3.2): dispatch and combine
alone, two micro-batches in turn.
"""

import dataclasses
import functools
from dataclasses import dataclass

from deepseek_jax.config import Precision
from experiments.planning.choose import prediction
from experiments.planning.setup import setup
from experiments.planning.work import STACK_PASSES, step_work
from experiments.recipes import deepseek_v3
from sharding.hardware import cluster
from sharding.pipeline import Times, dualpipe, simulate

STAGES, MICRO_BATCHES = 16, 120
TOKENS, WIDTH, CHOICES = 4096, 7168, 8
LAYERS = 61
# SMs with which the H800's communication kernels fill its links (ISCA section 4.4).
ENOUGH_SMS = 20
# Bytes of an element: FP8 with a scale for 128 out, BF16 back.
OUT, BACK = 1 + 4 / 128, 2.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The figures that studies change; the defaults are the H800's and the paper's."""

    sms: int = 132
    communication_sms: int = 20
    engine: bool = False  # communication needs no SM
    fp8: float = 1.0  # speed of FP8 products over the H800's
    nic: float = 50e9  # bytes per second and direction
    nvlink: float = 200e9
    reached: float = 0.8  # of both, by large messages: 40 and 160 GB/s
    node_limit: int = 4  # nodes that a token is sent to
    multicast: bool = False  # the network copies a token for its targets
    reduction: bool = False  # the network adds up what comes back
    back: float = BACK  # bytes of an element in combine
    latency: float = 0.0  # seconds of a message
    kv_traffic: float = 0.0  # bytes per second that share the NIC's PCIe lanes
    pcie: float = 64e9  # 16 lanes of PCIe 5
    pcie_priority: bool = False  # the NIC's traffic goes first

    def __post_init__(self):
        if not 0 <= self.communication_sms < self.sms:
            raise ValueError(
                f"communication_sms={self.communication_sms} must be from 0 to {self.sms - 1}"
            )
        if not 1 <= self.node_limit <= CHOICES:
            raise ValueError(f"node_limit={self.node_limit} must be from 1 to {CHOICES}")

    @property
    def computing_sms(self) -> int:
        return self.sms if self.engine else self.sms - self.communication_sms

    @property
    def nic_rate(self) -> float:
        """What PCIe leaves of the NIC: a share by demand, if more is asked for than it carries."""
        wanted = self.nic + self.kv_traffic
        if self.pcie_priority or not self.kv_traffic or wanted <= self.pcie:
            return self.nic
        return self.pcie * self.nic / wanted


H800 = Machine()


def wire_units(machine: Machine, copies: float, out: float, back: float) -> float:
    """Bytes of an element on the busier side of a NIC while dispatch and combine of different
    micro-batches run at a time: `out` bytes leave for each copy and arrive, `back` bytes return.

    Every NIC sends and receives as much as any other, so multicast spares senders only, and sums
    in the network spare receivers only.
    """
    sent = out * (1 if machine.multicast else copies) + back * copies
    received = out * copies + back * (1 if machine.reduction else copies)
    return max(sent, received)


def transfer_seconds(
    machine: Machine = H800, *, tokens: int = 32, copies: int = 9, hidden: int = 7000
) -> float:
    """Dispatch and combine of a layer in decoding: 1 byte out, straight to each expert's GPU."""
    return wire_units(machine, copies, 1, machine.back) * tokens * hidden / machine.nic_rate


def token_seconds(machine: Machine = H800) -> float:
    """Time per output token: in each layer two micro-batches, each a message out and one back."""
    return LAYERS * 2 * (transfer_seconds(machine) + 2 * machine.latency)


def nic_copies(machine: Machine, *, forwarded: bool = True) -> int:
    """Times t, a token's time on a NIC, that sending it to its experts takes (ISCA section 4.3)."""
    return machine.node_limit if forwarded else CHOICES


def dispatch_units(machine: Machine) -> float:
    """The same with NVLink, which hands copies on to all experts at the same time."""
    return max(nic_copies(machine), CHOICES * machine.nic / machine.nvlink)


# Parts of a step that read and write memory, and how much of ours the paper's own program has:
# it fills no stacks with zeros before it keeps activations in them, and weights stay in FP8.
MEMORY = {
    "norms, casts, copies": 1.0,
    "kept activations": (STACK_PASSES - 1) / STACK_PASSES,
    "logits": 1.0,
    "gradients": 1.0,
}
# Of steps that are not repeated for each micro-batch, or not there.
APART = ("optimizer", "casts of weights")


@functools.cache
def chunk_work() -> tuple[float, float, float]:
    """Seconds of products in FP8 and in BF16 and of memory traffic of a chunk, forward and
    backward, on all SMs."""
    run = dataclasses.replace(deepseek_v3(), precision=Precision.of("fp8"))
    mesh = {"data": 1, "fsdp": 32, "expert": 64, "tensor": 1}
    made = setup(run, cluster("h800x2048"), mesh, sequences=1)
    parts = prediction(made).work_by_part
    memory = sum(parts[part] * share for part, share in MEMORY.items())
    in_fp8 = {item.part for item in step_work(made) if item.flops_fp8}
    fp8 = sum(parts[part] for part in in_fp8)
    bf16 = sum(parts[part] for part in parts if part not in (*MEMORY, *APART, *in_fp8))
    # As many tokens for a device, of all layers instead of a stage's.
    chunks = made.accumulation * STAGES
    return fp8 / chunks, bf16 / chunks, memory / chunks


def chunk_communication(machine: Machine) -> float:
    """Seconds of a chunk's dispatch and combine, forward and backward."""
    copies = machine.node_limit
    nic = wire_units(machine, copies, OUT, machine.back) / machine.nic_rate
    nvlink = CHOICES * (OUT + machine.back) / machine.nvlink
    filled = 1.0 if machine.engine else min(1.0, machine.communication_sms / ENOUGH_SMS)
    if not filled:
        raise ValueError("with no SM and no engine nothing communicates")
    layers = 2 * (LAYERS - 3) / STAGES
    messages = layers * 2 * machine.latency
    return layers * TOKENS * WIDTH * max(nic, nvlink) / machine.reached / filled + messages


def chunk_times(machine: Machine = H800) -> Times:
    """A chunk's times for the schedule: by itself nothing is hidden, in a pair all that can be."""
    fp8, bf16, memory = chunk_work()
    work = (fp8 / machine.fp8 + bf16) * machine.sms / machine.computing_sms + memory
    sending = chunk_communication(machine)
    return Times(
        forward=work / 3 + sending / 2,
        backward=2 * work / 3 + sending / 2,
        weight=work / 3,
        pair=max(work, sending),
    )


def step_seconds(machine: Machine = H800) -> float:
    """A training step of V3."""
    return _simulated(chunk_times(machine))


@functools.cache
def _simulated(times: Times) -> float:
    return simulate(dualpipe(STAGES, MICRO_BATCHES), times).seconds
