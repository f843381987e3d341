"""`plan`: what a train step holds, sends and costs on a cluster that need not be there."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepseek_jax import configs
from deepseek_jax.config import Precision, Run, to_json
from deepseek_jax.counts import train_flops_per_token
from experiments.planning import targets
from experiments.planning.choose import best_setup, prediction
from experiments.planning.compare import by_axes, compared, low_precision_sums, others
from experiments.planning.compile import Compiled, compile_setup
from experiments.planning.decode import decode_rows
from experiments.planning.memory import Memory, argument_bytes, memory, tile_bytes
from experiments.planning.setup import Setup, mesh_name, mesh_of, setup
from experiments.planning.targets import Target
from experiments.provenance import code_and_day
from experiments.recipes import recipe
from experiments.tables import print_table, write_json
from sharding.cost import Prediction
from sharding.hardware import Cluster, cluster

GIB = 2**30


@dataclass(frozen=True)
class PlanArgs:
    """Memory, traffic and time of a recipe's train step on a cluster, compiled for it.

    No device of the cluster is needed. The step is compiled for as many fake CPU devices, or, with
    the extra plan-cuda or plan-tpu installed, for the accelerators themselves.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "deepseek_v3"
    """Name of the recipe."""
    cluster: str = "h200x2048"
    """ACCELERATORxDEVICES: h800, h100, h200, gb200, v5p, v6e, tpu7x or cpu."""
    mesh: str | None = None
    """Sizes of mesh axes, such as fsdp=32,expert=64; by default the best of the cost model."""
    zero: int = 3
    """3: weights are gathered layer by layer; 1: once a step."""
    sequences: int | None = None
    """Sequences of one device in a micro-batch."""
    remat: str | None = None
    """none, paper, attention or full; the recipe's by default."""
    precision: str | None = None
    """fp32, bf16 or fp8; the recipe's by default."""
    target: str | None = None
    """cpu, or the cluster's own kind (gpu, tpu); by default the latter if its compiler is here."""
    compile: bool = True
    """Compile; --no-compile gives the formulas alone, in a second."""
    decode: bool = False
    """Plan decoding instead of training."""
    batch: int | None = None
    """Of --decode: requests of one tensor group, a device where tensor is 1; 128 by default."""
    context: int | None = None
    """Of --decode: tokens in the cache of each request; by default 4096, or as many as fit."""
    json: Path | None = None
    """Also write everything to this file."""


def plan(args: PlanArgs) -> None:
    """Prints the plan, table by table."""
    check_used(args)
    where, run = cluster(args.cluster), run_of(args)
    if args.decode:
        mesh = mesh_of(args.mesh, where.devices) if args.mesh else None
        batch = 128 if args.batch is None else args.batch
        context = context_of(args, run)
        rows = decode_rows(run, where, mesh, batch=batch, context=context)
        print_table(rows, title=f"{args.recipe}: decoding on {where.name}")
        if args.json is not None:
            asked = {"recipe": args.recipe, "cluster": where.name, "mesh": mesh,
                     "batch": batch, "context": context}  # fmt: skip
            write_json(args.json, {**asked, **code_and_day(), "rows": rows})
        return
    chosen = chosen_setup(args, run, where)
    print(f"{args.recipe} on {where.name}: {chosen.name}")
    for line in remarks(run, chosen):
        print(f"  {line}")
    found = None
    if args.compile:
        target = target_of(args.target, where)
        found = compile_setup(chosen, target)
    result = figures(chosen, found)
    for title, rows in result["tables"].items():
        if rows:
            print_table(rows, title=title)
    for line in result["remarks"]:
        print(line)
    if args.json is not None:
        write_json(args.json, {"recipe": args.recipe, **code_and_day(), **result})


def check_used(args: PlanArgs) -> None:
    """Refuses an option that the plan asked for would not look at."""
    plain = PlanArgs()
    if args.decode:
        unused, reason = ("zero", "sequences", "remat", "target"), "training: leave out --decode"
    else:
        unused, reason = ("batch", "context"), "decoding: add --decode"
    for name in unused:
        if getattr(args, name) != getattr(plain, name):
            raise ValueError(f"--{name} {getattr(args, name)} is an option of {reason}")
    if args.target is not None and not args.compile:
        raise ValueError(f"--target {args.target} has no use with --no-compile: leave one out")


def context_of(args: PlanArgs, run: Run) -> int:
    """Tokens in a request's cache, no more than the model takes."""
    # A recipe may be of pretraining alone: the released model of its name takes longer texts.
    config = configs.NAMED.get(args.recipe.replace("-", "_"), lambda: run.config)()
    most = config.max_length
    if args.context is not None and args.context > most:
        raise ValueError(
            f"--context {args.context} must be at most {most}, the max_length of {args.recipe}"
        )
    return min(4096, most) if args.context is None else args.context


def run_of(args: PlanArgs) -> Run:
    """The recipe's run in the wanted precision."""
    run = recipe(args.recipe)(None)
    if args.precision is not None:
        run = dataclasses.replace(run, precision=Precision.of(args.precision))
    return run


def chosen_setup(args: PlanArgs, run: Run, where: Cluster) -> Setup:
    """The mesh that was asked for, or the fastest that fits."""
    if args.zero not in (1, 3):
        raise ValueError(f"--zero {args.zero} must be 1 or 3")
    if args.mesh is None:
        if args.zero == 1:
            raise ValueError("--zero 1 needs --mesh: the best mesh is looked for with zero 3")
        return best_setup(run, where, sequences=args.sequences, remat=args.remat)
    mesh = mesh_of(args.mesh, where.devices)
    return setup(run, where, mesh, sequences=args.sequences, remat=args.remat, zero=args.zero)


def target_of(name: str | None, where: Cluster) -> Target:
    """What to compile for, said aloud where it is not the cluster's own kind."""
    own = where.accelerator.platform
    if name not in (None, "cpu", own):
        raise ValueError(f"--target {name!r} must be cpu or {own}, what {where.name} is made of")
    reason = targets.missing(name or own)
    if reason is None:
        return name or own
    if name is not None:
        raise ValueError(reason)
    print(f"  {reason}; compiling for {where.devices} fake CPU devices instead")
    return "cpu"


def remarks(run: Run, chosen: Setup) -> list[str]:
    """What the plan changes of the recipe, and where it departs from the paper."""
    lines = []
    wanted, batch = int(run.batch_size.phases[-1].end), int(chosen.run.batch_size.phases[0].start)
    if wanted != batch:
        lines.append(
            f"a step of {batch:,} sequences: the recipe's {wanted:,} is no multiple of the "
            f"{chosen.run.micro_batch:,} of a micro-batch over the mesh"
        )
    if chosen.run.config.num_layers == 61 and chosen.cluster.devices == 2048:
        lines.append(
            f"{mesh_name(chosen.mesh)} in place of the paper's pipeline of 16 x expert 64 x data 2"
        )
    if chosen.scheme.room is not None:
        lines.append(f"buffers of dispatch hold {chosen.scheme.room} times an even load")
    return lines


def figures(chosen: Setup, found: Compiled | None) -> dict[str, Any]:
    """Everything that is printed and written."""
    held, expected = memory(chosen), prediction(chosen)
    tables = {
        "memory of a device": memory_rows(chosen, held, found),
        "floating-point operations": flop_rows(chosen),
        "predicted time of a step": time_rows(chosen, expected),
    }
    lines = verdict(chosen, held, expected, found)
    if found is not None and found.refused is None:
        tables["bytes a device sends in a step"] = [
            {"for": t.purpose, "formula GB": t.foreseen / 1e9, "compiled GB": t.compiled / 1e9,
             "difference %": 100 * (t.compiled / t.foreseen - 1) if t.foreseen else None,
             "calls": t.calls}
            for t in compared(chosen, found.collectives)
        ]  # fmt: skip
        tables["compiled collectives by mesh axis"] = by_axes(chosen, found.collectives)
        tables["collectives that no formula foresees"] = others(chosen, found.collectives)[:8]
        lines += compiler_remarks(chosen, found)
    return {
        "cluster": chosen.cluster.name,
        "mesh": dict(chosen.mesh),
        "scheme": dataclasses.asdict(chosen.scheme),
        "sequences": chosen.sequences,
        "accumulation": chosen.accumulation,
        "run": to_json(chosen.run),
        "tables": tables,
        "remarks": lines,
    }


def memory_rows(chosen: Setup, held: Memory, found: Compiled | None) -> list[dict[str, Any]]:
    """Bytes by formula, and what the compiler says."""
    names = {
        "parameters": "parameters (FP32)",
        "optimizer": "optimizer (moments)",
        "gradients": "gradients (FP32)",
        "gathered": "weights gathered for the step",
        "kept": "activations kept, about",
        "working": "the largest layer at work, about",
    }
    rows = [{"what": label, "bytes": int(getattr(held, name)),
             "GiB": getattr(held, name) / GIB}
            for name, label in names.items() if name != "gathered" or held.gathered]  # fmt: skip
    rows.append({"what": "together, about", "bytes": int(held.total), "GiB": held.total / GIB})
    if found is not None and found.refused is None:
        handed = [("state and batch", argument_bytes(chosen))]
        if found.target.startswith("TPU"):
            tiled = argument_bytes(chosen) + tile_bytes(chosen)
            handed.append(("state and batch in the tiles of a TPU", tiled))
        for label, size in (
            *handed,
            (f"{found.target} compiler: state and batch", found.arguments),
            (f"{found.target} compiler: temporary", found.temporary),
            (f"{found.target} compiler: peak", found.peak),
        ):
            rows.append({"what": label, "bytes": size, "GiB": size / GIB})
    has = chosen.cluster.accelerator.memory
    rows.append({"what": f"a device of {chosen.cluster.name} has", "bytes": has, "GiB": has / GIB})
    return rows


def flop_rows(chosen: Setup) -> list[dict[str, Any]]:
    """GFLOP of a token by the paper's rule, and PFLOP of a device and step."""
    config, length = chosen.run.config, chosen.run.seq_len
    count = lambda causal, mtp: train_flops_per_token(config, length, causal=causal, mtp=mtp)
    rows = []
    for label, causal in (("causal attention", True), ("full attention", False)):
        main = count(causal, False)
        for what, flops in (("main model", main), ("MTP", count(causal, True) - main)):
            each = flops * chosen.step_tokens / chosen.cluster.devices
            rows.append({"of": what, "counted with": label, "GFLOP a token": f"{flops / 1e9:.5g}",
                         "TFLOP a device and step": each / 1e12})  # fmt: skip
    return rows


def time_rows(chosen: Setup, expected: Prediction) -> list[dict[str, Any]]:
    """Seconds by part, then of the step."""
    rows = [
        {"part": part, "work s": seconds, "communication s": None}
        for part, seconds in expected.work_by_part.items()
    ]
    rows += [
        {"part": part, "work s": None, "communication s": seconds}
        for part, seconds in expected.communication_by_part.items()
    ]
    rows.append({"part": "all", "work s": expected.work, "communication s": expected.communication})
    exposed = {"part": "exposed communication", "communication s": expected.exposed}
    return [*rows, exposed, {"part": "the step", "work s": expected.seconds}]


def verdict(
    chosen: Setup, held: Memory, expected: Prediction, found: Compiled | None
) -> list[str]:
    """Whether it fits, and how fast the step would be."""
    has = chosen.cluster.accelerator.memory
    if found is not None and found.refused is not None:
        needs = f"needs {found.needs / GIB:.1f} GiB, " if found.needs else ""
        fits = f"does not fit: {needs}a device has {has / GIB:.1f} GiB ({found.refused[:120]})"
    else:
        needs = found.peak if found is not None and found.target != "cpu" else held.total
        word = "fits" if needs <= has else "does not fit"
        by = "compiler's peak" if found is not None and found.target != "cpu" else "formula"
        fits = f"{word}: needs {needs / GIB:.1f} GiB ({by}), a device has {has / GIB:.1f} GiB"
    rate = chosen.step_tokens / expected.seconds
    flops = train_flops_per_token(chosen.run.config, chosen.run.seq_len, causal=True, mtp=False)
    used = rate * flops / chosen.cluster.devices / chosen.cluster.accelerator.flops_bf16
    return [
        fits,
        f"predicted: {expected.seconds:.3g} s a step of {chosen.step_tokens:,} tokens, "
        f"{rate:,.0f} tokens/s, {100 * used:.1f} % of the BF16 peak (main model, causal)",
    ]


def compiler_remarks(chosen: Setup, found: Compiled) -> list[str]:
    """What the compiler was asked and what it did that it should not."""
    low = low_precision_sums(chosen, found.collectives)
    kernels = ", ".join(f"{n} {name}" for name, n in sorted(found.kernels.items()))
    lines = [
        f"compiled for {found.target} in {found.compile_seconds:.0f} s (lowered in "
        f"{found.lower_seconds:.0f} s; {found.cpu_seconds:.0f} s of processor time in all, "
        f"{found.host_gib:.1f} GiB of this machine)",
        f"sums of weight gradients below FP32: {'; '.join(low[:3]) or 'none'}",
        f"call sites of kernels: {kernels or 'none'}",
        f"equal kernels lowered more than once: {'; '.join(found.repeated) or 'none'}",
        f"compiler warnings: {'; '.join(found.warnings) or 'none'}",
    ]
    if found.target == "cpu":
        lines.append("the CPU compiler sums with all-reduce where others reduce-scatter, and in "
                     "FP32; its element counts hold, its peak is no other device's")  # fmt: skip
    if found.target.startswith("TPU"):
        lines.append("the TPU compiler pads arrays, and does not note how often loops run: that is "
                     "read off their conditions")  # fmt: skip
    return [*lines, *found.notes]

