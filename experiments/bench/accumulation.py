"""`bench accumulation`: errors of FP8 sums on this card beside the model of its accumulator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernel_data import F8, F32, for_jax, for_torch
from experiments.bench.kernel_report import verdict
from experiments.bench.kernel_time import import_torch, require_gpu
from experiments.provenance import provenance
from experiments.study.accumulator import accumulate, operands
from experiments.tables import plain, print_table, write_json
from pallas_kernels.matmul_fp8 import matmul
from pallas_kernels.quantize_fp8 import Tiles

KINDS = ("zero-mean", "positive")
OURS, FAST, PRECISE = "ours, FP32 every 128", "cuBLASLt, fast", "cuBLASLt, precise"
NEVER, OFTEN = "model, 13 bits", "model, FP32 every 128"
Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class BenchAccumulationArgs:
    """Multiply E4M3 matrices with our kernel and with cuBLASLt, and compare with exact sums.

    Fast accumulation leaves sums in the tensor core; the model of `study accumulation` says how
    far off they should be (ISCA section 3.1.1).
    """

    elements: int = 4096
    """Length of the contraction."""
    rows: int = 128
    """Rows of both matrices."""
    peers: bool = True
    """Ask cuBLASLt too, through torch."""
    json: Path | None = None
    """Also write the table to this file."""


def bench_accumulation(args: BenchAccumulationArgs) -> None:
    """Measures, prints and judges; seconds."""
    for name in ("elements", "rows"):
        if getattr(args, name) < 128 or getattr(args, name) % 128:
            raise ValueError(f"--{name} {getattr(args, name)} must be a multiple of 128")
    require_gpu("bench accumulation", torch=args.peers)
    products: dict[str, Product] = {OURS: our_product}
    if args.peers:
        products |= {FAST: peer(True), PRECISE: peer(False)}
    rows = [row for kind in KINDS for row in errors(kind, products, args.elements, args.rows)]
    origin = provenance()
    print_table(rows, title=f"sums of {args.elements}, {origin['card']}")
    verdicts = judge(rows)
    print_table(verdicts, title="bars")
    if args.json is not None:
        write_json(args.json, plain({**origin, "rows": rows, "verdicts": verdicts}))


def errors(
    kind: str, products: Mapping[str, Product], num_elements: int, num_rows: int
) -> list[dict[str, Any]]:
    """A row for each product and for the model; the model computes the same matrices."""
    a_MK, b_NK = operands(kind, num_rows, num_elements)
    exact_MN = a_MK @ b_NK.T
    found = {name: product(a_MK, b_NK) for name, product in products.items()}
    for name, promote in ((NEVER, None), (OFTEN, 128)):
        found[name] = accumulate(a_MK, b_NK, promote=promote)
    rows = []
    for name, sum_MN in found.items():
        off_MN = np.asarray(sum_MN, np.float64) - exact_MN
        rows.append({
            "data": kind,
            "sum": name,
            "error %": 100 * np.linalg.norm(off_MN) / np.linalg.norm(exact_MN),
            "largest %": 100 * np.abs(off_MN).max() / np.abs(exact_MN).max(),
        })  # fmt: skip
    return rows


def our_product(a_MK: np.ndarray, b_NK: np.ndarray) -> np.ndarray:
    """The block-scaled kernel with all scales 1."""
    a, b = (for_jax(x.astype(F8)) for x in (a_MK, b_NK))
    blocks = a.shape[1] // 128
    scale_kM = jnp.ones((blocks, a.shape[0]), F32)
    scale_nk = jnp.ones((b.shape[0] // 128, -(-blocks // 32) * 32), F32)
    product = jax.jit(lambda *x: matmul(Tiles(x[0], x[1]), *x[2:], out_dtype=F32))
    return np.asarray(product(a, scale_kM, b, scale_nk))


def peer(fast: bool) -> Product:
    """cuBLASLt with one scale of 1 a tensor."""

    def product(a_MK, b_NK):
        torch = import_torch()
        a, b = (for_torch(torch, x.astype(F8)) for x in (a_MK, b_NK))
        one = torch.ones((), device="cuda")
        out = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast)
        return out.cpu().numpy()

    return product


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums on the card are as far off as the model says, within a factor of 2; promotion mends."""
    by_name = {(row["data"], row["sum"]): row["error %"] for row in rows}
    verdicts = []
    for kind in KINDS:
        for card, model in ((FAST, NEVER), (OURS, OFTEN)):
            if (kind, card) in by_name:
                over = by_name[kind, card] / by_name[kind, model]
                bar = f"{kind}: {card} over {model}"
                verdicts.append(verdict(f"{bar}, at least", over, 0.5))
                verdicts.append(verdict(f"{bar}, at most", over, 2.0, most=True))
        if (kind, FAST) in by_name:
            gain = by_name[kind, FAST] / by_name[kind, OURS]
            least = 8 if kind == "zero-mean" else 50
            verdicts.append(verdict(f"{kind}: promotion every 128 cuts the error", gain, least))
    return verdicts
