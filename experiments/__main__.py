"""The command line, `python -m experiments` or `deepseek-jax`: a table of commands."""

import os
import sys
from typing import NoReturn

from experiments.command_line import INTERRUPTED, Command, run

# A name of two words is a member of a family: `bench train`. Modules are imported when chosen.
COMMANDS = {
    "launch": Command(
        "experiments.launch",
        "launch",
        "train a recipe; with none, a tiny V3 on real text",
        "tiny --run runs/first --steps 200",
    ),
    "sample": Command(
        "experiments.sample",
        "sample",
        "stream text from a trained run",
        'runs/first --prompt "import "',
    ),
    "convert": Command(
        "experiments.convert",
        "convert",
        "released weights in another format, a run as released weights, and what they hold",
        "DeepSeek-V3 DeepSeek-V3-bf16 --format bf16",
    ),
    "eval": Command(
        "experiments.eval",
        "evaluate",
        "bits per byte of a run on its validation text, or on other text",
        "runs/first --data README.md",
    ),
    "explain": Command(
        "experiments.explain",
        "explain",
        "every parameter and operation of a model: shape, dtype, sharding, precision",
        "deepseek_v3",
    ),
    "claims": Command(
        "experiments.claims.command",
        "claims",
        "the paper's tables and figures, computed again and judged",
        "kv_cache",
    ),
    "plan": Command(
        "experiments.plan",
        "plan",
        "memory, traffic and time of a train step on a cluster that need not be there",
        "deepseek_v3 --cluster h200x2048 --mesh fsdp=32,expert=64",
    ),
    "sweep": Command(
        "experiments.sweep",
        "sweep_command",
        "every mesh of a recipe on a cluster: costed, the best compiled, ranked, drawn",
        "deepseek_v3 --cluster h200x2048",
    ),
    "network": Command(
        "experiments.network",
        "network",
        "what a network of switches costs and carries, whole or with parts broken",
        "multi_plane --nodes 256 --routing ecmp",
    ),
    "place": Command(
        "experiments.place",
        "place",
        "experts and copies of the busy ones on devices, by the loads of a run",
        "runs/tiny --devices 8",
    ),
    "bench decode": Command(
        "experiments.bench.decode",
        "bench_decode",
        "tokens/s of generation, beside the memory's limit or transformers",
        "peer --batch 1 128 --precision bf16",
    ),
    "bench draft": Command(
        "experiments.bench.draft",
        "bench_draft",
        "drafting with MTP modules: tokens unchanged, acceptance, speed, as a plot",
        "runs/tiny --out runs/draft.png",
    ),
    "bench train": Command(
        "experiments.bench.train",
        "bench_train",
        "tokens/s, TFLOP/s and memory of a recipe's train step",
        "peer --precision bf16",
    ),
    "bench mesh": Command(
        "experiments.bench.mesh",
        "bench_mesh",
        "a train step on every legal mesh of this host, beside one device and the plan",
        "peer --micro-batch 1 2 4 --json runs/mesh.json",
    ),
    "bench dispatch": Command(
        "experiments.bench.dispatch",
        "bench_dispatch",
        "tokens to the devices of their experts and back, beside NCCL's own all-to-all",
        "--tokens 8192 --path padded ragged --json runs/dispatch.json",
    ),
    "bench fp8_loss": Command(
        "experiments.bench.fp8_loss",
        "bench_fp8_loss",
        "one model trained in BF16 and in FP8 from the same seeds and data: the gap of the loss",
        "--data shards --only fp8-0",
    ),
    "bench residual": Command(
        "experiments.bench.residual",
        "bench_residual",
        "a dense model whose branches round what they add to FP8 or LogFMT, beside BF16",
        "--data runs/tokens --json runs/residual.json",
    ),
    "bench kernels": Command(
        "experiments.bench.kernel_run",
        "bench_kernels",
        "gemm, grouped and quantize in one run: every kernel checked and timed on this GPU",
        "--out runs/bench",
    ),
    "bench gemm": Command(
        "experiments.bench.gemm",
        "bench_gemm",
        "the dense FP8 products of this GPU beside cuBLASLt's, checked and timed",
        "--out runs/bench",
    ),
    "bench grouped": Command(
        "experiments.bench.grouped",
        "bench_grouped",
        "the experts' FP8 and BF16 products beside torch's, checked and timed",
        "--out runs/bench",
    ),
    "bench quantize": Command(
        "experiments.bench.quantize",
        "bench_quantize",
        "quantisation and its fused forms beside a copy of as many bytes",
        "--out runs/bench",
    ),
    "bench logfmt": Command(
        "experiments.bench.logfmt",
        "bench_logfmt",
        "LogFMT encoded and decoded beside a copy of as many bytes, checked and timed",
        "--out runs/bench",
    ),
    "bench combine": Command(
        "experiments.bench.combine",
        "bench_combine",
        "loss and bytes of each format in which experts' results travel",
        "tiny --steps 200",
    ),
    "bench accumulation": Command(
        "experiments.bench.accumulation",
        "bench_accumulation",
        "errors of FP8 sums on this GPU beside the bit-level model of its accumulator",
        "",
    ),
    "bench tune": Command(
        "experiments.bench.tune",
        "bench_tune",
        "tiles of the kernels measured on this GPU and written into the ops' tables",
        "gemm",
    ),
    "bench balance": Command(
        "experiments.bench.balance",
        "bench_balance",
        "expert load and loss with and without the routing-bias update, as a plot",
        "tiny --out runs/balance",
    ),
    "pipeline": Command(
        "experiments.pipeline",
        "pipeline",
        "idle time and memory of pipeline schedules, and a picture of their timelines",
        "1f1b dualpipe --pair 2.5 --picture timelines.svg",
    ),
    "study accumulation": Command(
        "experiments.study.accumulation",
        "study_accumulation",
        "bits that an FP8 accumulator keeps: error, training step",
        "--picture accumulation.svg",
    ),
    "study convergence": Command(
        "experiments.study.convergence",
        "study_convergence",
        "SMs that communicate, NVLink and NIC, multicast, PCIe: training step, time per token",
        "--picture convergence.svg",
    ),
    "study fabric": Command(
        "experiments.study.fabric",
        "study_fabric",
        "latency, CPU proxy, links and routing: time per token",
        "--picture fabric.svg",
    ),
    "study map": Command(
        "experiments.study.recommendations",
        "study_map",
        "the paper's recommendations on hardware, each with its study",
        "",
    ),
    "report": Command(
        "experiments.report",
        "report",
        "write the report of a run again, finished or not",
        "runs/tiny",
    ),
}


def main() -> int:
    """Run the command named on the command line and return its exit code."""
    return run(COMMANDS, sys.argv[1:])


def program() -> NoReturn:
    """`main` as a whole process, which it ends."""
    code = main()
    if code == INTERRUPTED:
        # A thread of XLA that still compiles would crash the interpreter at its end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
