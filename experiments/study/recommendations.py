"""`study map`: each recommendation of the paper, the study that models it, or why none does."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.tables import print_table


class Recommendation(NamedTuple):
    """Of the paper's section, in our words; `study` names the command and its table."""

    section: str
    wish: str
    study: str | None
    because: str = ""


ENGINE = "convergence: SMs of 132"
MULTICAST = "convergence: multicast, sums and formats"
RECOMMENDATIONS = (
    Recommendation("3.1.2", "sums in FP32, or of configurable precision", "accumulation: error"),
    Recommendation("3.1.2", "scales of tiles inside the tensor core", "accumulation: error",
                   "the step without promotion is that of a core that scales and sums itself"),
    Recommendation("3.2.2", "formats such as LogFMT encoded and decoded by hardware", MULTICAST,
                   "bytes only: what encoding costs today is measured by `bench logfmt`"),
    Recommendation("4.4.2", "one adapter for scale-up and scale-out networks",
                   MULTICAST, "the row of a NIC as fast as NVLink, which reaches every GPU"),
    Recommendation("4.4.2", "a co-processor for communication", ENGINE),
    Recommendation("4.4.2", "forwarding, broadcast and reduction in hardware", MULTICAST),
    Recommendation("4.4.2", "synchronisation with acquire and release in hardware", None,
                   "the model has no memory ordering; its cost is part of a message's latency"),
    Recommendation("4.5.2", "priorities between NVLink and PCIe traffic", "convergence: KV caches"),
    Recommendation("4.5.2", "the NIC inside the I/O die", "convergence: KV caches",
                   "as a NIC whose traffic always goes first; the shorter way is not counted"),
    Recommendation("4.5.2", "NVLink between CPU and GPU", "convergence: KV caches",
                   "KV caches then leave PCIe to the NIC: the row of no traffic"),
    Recommendation("5.1", "NICs of several planes, packets in any order", None,
                   "flows are fluid here, so they have no order; `network multi_plane` and "
                   "`claims plane_lost` model planes"),
    Recommendation("5.2.2", "RoCE switches of low latency", "fabric: links"),
    Recommendation("5.2.2", "adaptive routing instead of ECMP", "fabric: routing"),
    Recommendation("5.2.2", "more queues, and congestion control that can be programmed", None,
                   "rates are max-min fair at once: there are no queues and nothing to control"),
    Recommendation("5.2.3", "GPUs that ring the NIC themselves", "fabric: links"),
    Recommendation("6.1", "checksums and redundancy against silent corruption", None,
                   "no faults of arithmetic or memory are modelled"),
    Recommendation("6.2", "CPUs with direct links, 160 lanes, 1 TB/s and fast cores", None,
                   "the CPU is not modelled; `claims pcie_lanes` does the arithmetic"),
    Recommendation("6.3", "co-packaged optics, credit-based flow control, isolation", None,
                   "a link here has a rate and a latency, no optics and no credits"),
    Recommendation("6.3", "networks that route around what fails", None,
                   "`network --broken-switches` and --broken-cables show what is lost, which is "
                   "a figure of the network and of no machine"),
    Recommendation("6.4", "ordered memory semantics (region acquire and release)", None,
                   "the model has no memory ordering; a message's latency holds its fence"),
    Recommendation("6.5", "multicast for dispatch, sums for combine in the network", MULTICAST),
    Recommendation("6.5", "LogFMT in the network", MULTICAST),
    Recommendation("6.6", "DRAM stacked on logic, systems on a wafer", None,
                   "the limits studied here are the network's; `plan` compares "
                   "accelerators of different memory bandwidth"),
)  # fmt: skip


@dataclass(frozen=True)
class MapArgs:
    """Which study models which of the paper's recommendations, or why none does."""

    json: Path | None = None
    """Also write the table to this file."""


def study_map(args: MapArgs) -> None:
    """The command `study map`."""
    rows = [
        {
            "section": r.section,
            "recommendation": r.wish,
            "study": r.study or "not modelled",
            "because": r.because or None,
        }
        for r in RECOMMENDATIONS
    ]
    print_table(rows, json_path=args.json)
