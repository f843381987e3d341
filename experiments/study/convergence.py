"""`study convergence`: scale-up and scale-out networks, the SMs between them, PCIe lanes."""

import dataclasses
from dataclasses import dataclass

from experiments.study.machine import (
    CHOICES,
    H800,
    Machine,
    chunk_communication,
    dispatch_units,
    nic_copies,
    step_seconds,
    token_seconds,
    transfer_seconds,
)
from experiments.study.show import Output, Section, check_figures, present


@dataclass(frozen=True)
class ConvergenceArgs(Output):
    """What SMs that communicate, node limits, multicast and PCIe traffic do to V3 on the H800.

    SMs up to 20 fill the links, in proportion; products run on the others. A token goes to a node
    once and by NVLink to its experts there. Decoding sends straight to every expert and takes no
    SM.
    """

    sms: tuple[int, ...] = (4, 8, 12, 16, 20)
    """SMs of 132 that communicate."""
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    """NVLink over NIC."""
    limits: tuple[int, ...] = (1, 2, 4, 8)
    """Nodes that a token is sent to at most."""
    kv: tuple[float, ...] = (0, 16, 32, 48, 64)
    """GB/s of a KV cache's way over the NIC's PCIe lanes."""


def study_convergence(args: ConvergenceArgs) -> None:
    """The command `study convergence`."""
    args.check()
    if min(args.ratios, default=0) < 1:
        raise ValueError(f"--ratios {args.ratios} must be at least 1")
    check_figures("--kv", args.kv)
    sections = [
        sms(args.sms), node_limits(args.ratios, args.limits), in_network(), pcie(args.kv)
    ]  # fmt: skip
    present(sections, args)


def effects(machine: Machine) -> dict[str, float]:
    """The step and the time per token, and their change from the H800."""
    step, token = step_seconds(machine), token_seconds(machine)
    return {
        "training step s": step,
        "step %": 100 * (step / step_seconds(H800) - 1),
        "TPOT ms": 1e3 * token,
        "TPOT %": 100 * (token / token_seconds(H800) - 1),
    }


def sms(numbers: tuple[int, ...]) -> Section:
    """SMs that communicate, and an engine that takes none."""
    machines = {str(n): dataclasses.replace(H800, communication_sms=n) for n in numbers}
    machines["0, engine"] = dataclasses.replace(H800, communication_sms=0, engine=True)
    rows = [
        {
            "communication SMs": name,
            "computing SMs": machine.computing_sms,
            "taken %": 100 * (1 - machine.computing_sms / machine.sms),
            "chunk's communication ms": 1e3 * chunk_communication(machine),
            **effects(machine),
        }
        for name, machine in machines.items()
    ]
    return Section("SMs of 132 that communicate", rows, "communication SMs", ("training step s",))


def node_limits(ratios: tuple[int, ...], limits: tuple[int, ...]) -> Section:
    """In units of t, the time of one copy of a token on a NIC."""
    rows = []
    for ratio in ratios:
        for limit in limits:
            machine = dataclasses.replace(H800, nvlink=ratio * H800.nic, node_limit=limit)
            rows.append({
                "NVLink / NIC, nodes": f"{ratio}, {limit}",
                "NIC, forwarded t": nic_copies(machine),
                "NIC, straight t": nic_copies(machine, forwarded=False),
                "NVLink t": CHOICES / ratio,
                "dispatch t": dispatch_units(machine),
                "experts at equal cost": min(CHOICES, ratio) * limit,
                "training step s": step_seconds(machine),
            })  # fmt: skip
    title = "Dispatch of a token to 8 experts, in its time t on a NIC"
    return Section(title, rows, "NVLink / NIC, nodes", ("NIC, forwarded t", "dispatch t"))


def in_network() -> Section:
    """What the network could do with tokens on their way, and LogFMT in combine."""
    change = dataclasses.replace
    machines = {
        "H800": H800,
        "multicast": change(H800, multicast=True),
        "reduction": change(H800, reduction=True),
        "both": change(H800, multicast=True, reduction=True),
        "combine in LogFMT-10": change(H800, back=(10 + 32 / 128) / 8),
        "combine in LogFMT-8": change(H800, back=(8 + 32 / 128) / 8),
        "both, LogFMT-8": change(H800, multicast=True, reduction=True, back=(8 + 32 / 128) / 8),
        "NIC as fast as NVLink": change(H800, nic=H800.nvlink),
    }
    rows = [
        {"network": name, "transfer us": 1e6 * transfer_seconds(machine), **effects(machine)}
        for name, machine in machines.items()
    ]
    return Section("Multicast, sums and formats in the network", rows, "network", ("TPOT ms",))


def pcie(gigabytes: tuple[float, ...]) -> Section:
    """KV caches that travel between CPU and GPU beside the NIC's traffic."""
    rows = []
    for rate in gigabytes:
        shared = dataclasses.replace(H800, kv_traffic=rate * 1e9)
        first = dataclasses.replace(shared, pcie_priority=True)
        rows.append({
            "KV traffic GB/s": rate,
            "NIC's share GB/s": shared.nic_rate / 1e9,
            "TPOT ms": 1e3 * token_seconds(shared),
            "TPOT ms, NIC first": 1e3 * token_seconds(first),
        })  # fmt: skip
    names = ("TPOT ms", "TPOT ms, NIC first")
    return Section("KV caches on 64 GB/s of PCIe", rows, "KV traffic GB/s", names)
