"""`explain`: every parameter and operation of a model, at any size, without its memory."""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from deepseek_jax import configs
from deepseek_jax.config import Precision, Run, Schedule
from deepseek_jax.counts import param_counts, train_flops_per_token
from deepseek_jax.training import TrainState, abstract_state, join, loss_and_aux
from experiments import program, tables
from experiments.command_line import unknown
from experiments.planning.setup import itemsize, named_sizes, refusal
from experiments.program import ATTENTION, LAYOUT, PRODUCTS, Op
from experiments.recipes import RECIPES
from experiments.tables import print_table, write_json
from sharding.mesh import AXES, all_axes
from sharding.rules import STORE, letters_of, weight_spec

# Operations listed one by one; the others are elementwise and are added up.
LISTED = frozenset(
    "argmax cos cumsum exp gather log logistic reduce_and reduce_max reduce_min reduce_or "
    "reduce_sum rsqrt scatter scatter-add sin sort sqrt tanh top_k".split()
)
MEANING = {"exp": "exp (softmax)", "rsqrt": "rsqrt (norm)", "cos": "cos (rotary)",
           "sin": "sin (rotary)", ATTENTION: "cuDNN attention"}
DEVICES = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "h100": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
    "h200": AbstractDevice("NVIDIA H200", 132, "gpu"),
}


@dataclass(frozen=True)
class ExplainArgs:
    """What a model is made of and what its training step computes, forward, in which precision.

    Nothing is allocated: DeepSeek-V3 with 671 B parameters takes seconds on a laptop.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "tiny"
    """A recipe (tiny, hundred_million, peer, deepseek_v3), or a configuration (kimi_k2,
    deepseek_v2_lite, ...)."""
    precision: str | None = None
    """fp32, bf16 or fp8; the recipe's by default, bf16 for a configuration."""
    mesh: tuple[str, ...] = ()
    """Sizes of mesh axes, such as --mesh fsdp=8 expert=16; then bytes are also per device."""
    device: str | None = None
    """cpu, h100 or h200: whose kernels to show; this machine's by default."""
    seq_len: int | None = None
    """Tokens of the one sequence that is traced; the recipe's by default."""
    every: bool = False
    """List every operation; otherwise those on single elements and layouts are added up."""
    json: Path | None = None
    """Also write parameters, operations, parts and totals to this file."""


def explain(args: ExplainArgs) -> None:
    """Prints parameters, operations, a summary by part, and totals."""
    run = run_of(args)
    mesh = mesh_sizes(args.mesh)
    reason = refusal(run, all_axes(mesh))
    if reason is not None:
        raise ValueError(f"--mesh {' '.join(args.mesh)}: {reason}")
    state = abstract_state(run)
    ops = forward_operations(run, state, args.device)
    parameters = parameter_rows(run, state, ops, mesh)
    listed = [op_row(run, op) for op in ops]
    parts = part_rows(run, parameters, ops)
    totals = total_row(run, args, parameters, ops)
    where = f" on {' x '.join(f'{axis}={n}' for axis, n in mesh.items())}" if mesh else ""
    print_table([readable(row) for row in parameters], title=f"{args.recipe}: parameters{where}")
    title = f"operations of the forward pass of the loss, one sequence of {run.seq_len} tokens"
    print_table(listed if args.every else shortened(run, ops), title=title)
    print_table([readable(row) for row in parts], title="by part")
    kernels = kernel_rows(run, state, args.device)
    if kernels:
        print_table(kernels, title="kernels of the loss and its gradient, one sequence")
    print_table([{"of the model": name, "total": tables.show(n)} for name, n in totals.items()])
    if args.json is not None:
        write_json(args.json, {"recipe": args.recipe, "parameters": parameters,
                               "operations": listed, "parts": parts, "kernels": kernels,
                               "totals": totals})


def run_of(args: ExplainArgs) -> Run:
    """The named recipe's run, or one around the named configuration."""
    name = args.recipe.replace("-", "_")
    if name in RECIPES:
        run = RECIPES[name](None)
    elif name in configs.NAMED:
        config = configs.NAMED[name]()
        run = Run(config=config, steps=1, seq_len=min(4096, config.max_length), micro_batch=1,
                  batch_size=Schedule.constant(1), learning_rate=Schedule.constant(0.0),
                  precision=Precision.of("bf16"))
    else:
        known = dict.fromkeys([*RECIPES, *configs.NAMED])
        raise ValueError(unknown("recipe or configuration", args.recipe, known))
    changes: dict[str, Any] = {}
    if args.precision is not None:
        changes["precision"] = Precision.of(args.precision)
    if args.seq_len is not None:
        changes["seq_len"] = args.seq_len
    return dataclasses.replace(run, **changes)


def mesh_sizes(words: Iterable[str]) -> dict[str, int]:
    """{"fsdp": 8} of ("fsdp=8",), in the order of AXES; axes of size 1 are left out."""
    sizes = named_sizes(",".join(words)) if words else {}
    return {axis: size for axis, size in all_axes(sizes).items() if size > 1}


def sequence_loss(run: Run) -> Callable:
    """The loss of one sequence, as the train step has it."""

    def loss(params, biases, tokens):
        return loss_and_aux(
            join(run, params, biases),
            tokens,
            mtp_weight=0.0,
            sequence_loss_weight=run.sequence_loss_weight,
            remat=run.remat,
        )[0]

    return loss


def forward_operations(run: Run, state: TrainState, device: str | None = None) -> list[Op]:
    """The operations of one sequence's loss."""
    tokens = jax.ShapeDtypeStruct((1, run.seq_len + 1), jnp.int32)
    with on_device(device):
        return program.operations(
            sequence_loss(run), params=state.params, biases=state.biases, tokens=tokens
        )


def kernel_rows(run: Run, state: TrainState, device: str | None) -> list[dict[str, Any]]:
    """The kernels of ours that the gradient of one sequence's loss calls; none on a CPU."""
    tokens = jax.ShapeDtypeStruct((1, run.seq_len + 1), jnp.int32)
    with on_device(device):
        kernels = program.kernels(
            jax.grad(sequence_loss(run)), state.params, state.biases, tokens
        )
    return [
        {"kernel": k.name, "calls": k.calls, "takes": ", ".join(k.takes),
         "returns": ", ".join(k.returns)}
        for k in kernels
    ]


@contextlib.contextmanager
def on_device(name: str | None):
    """Programs are traced for a device that this machine need not have."""
    if name is None:
        yield
        return
    if name not in DEVICES:
        raise ValueError(unknown("device", name, DEVICES))
    auto = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=auto, abstract_device=DEVICES[name])
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def parameter_rows(
    run: Run, state: TrainState, ops: list[Op], mesh: dict[str, int]
) -> list[dict[str, Any]]:
    """One row for each parameter and routing bias."""
    users = program.uses(ops)
    arguments = {"params": state.params, "biases": state.biases}
    moment = itemsize(run.precision.moments)
    rows = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        used, trained = users.get(name, []), name.startswith("params.")
        products = [op for op in used if op.name in PRODUCTS]
        spec = weight_spec(path[-1].key, leaf.shape, STORE, mesh or all_axes({}))
        num_bytes = leaf.size * leaf.dtype.itemsize
        shards = math.prod(mesh.get(axis, 1) for axis in axes_of(spec))
        row = {
            "parameter": name.partition(".")[2],
            "letters": letters_of(path[-1].key).rjust(len(leaf.shape), "L"),
            "shape": list(leaf.shape),
            "stored": program.dtype_name(leaf.dtype),
            "moments": run.precision.moments if trained else None,
            "lies on": placement(path[-1].key, spec),
            "computes in": ", ".join(dict.fromkeys(
                f"{op.name} {op.computes}" for op in products or used)),
            "part": part_of((products or used)[0]) if used else None,
            "parameters": leaf.size,
            "bytes": num_bytes,
        }
        if mesh:
            moments = 2 * moment * leaf.size if trained else 0
            row["bytes a device"] = num_bytes // shards
            row["with moments"] = (num_bytes + moments) // shards
        rows[name] = row
    order = dict.fromkeys([*(name for name in users if name in rows), *rows])
    return [rows[name] for name in order]


def readable(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a table that a person reads: bytes in round units."""
    bytes_in = ("bytes", "bytes a device", "with moments")
    return {k: size(v) if k in bytes_in else v for k, v in row.items()}


def size(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves a number above 1.

    >>> size(512), size(70272), size(2_730_545_949_696)
    ('512 B', '68.6 KiB', '2.48 TiB')
    """
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{num_bytes / 1024**power:.3g} {unit}"


def axes_of(spec) -> list[str]:
    """The mesh axes in a PartitionSpec."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return [axis for entry in entries for axis in entry]


def placement(name: str, spec) -> str:
    """Which letter lies on which mesh axes: "N tensor, Q fsdp expert"; "" for a whole array."""
    letters = letters_of(name).rjust(len(spec), "L")
    entries = zip(letters, spec, strict=True)
    return ", ".join(
        f"{letter} {entry if isinstance(entry, str) else ' '.join(entry)}"
        for letter, entry in entries
        if entry
    )


def part_of(op: Op) -> str:
    """The part of the model in two words at most: "moe/attention" for a norm inside it."""
    return "/".join(op.part.split("/")[:2]) or "model"


def flops_per_token(run: Run, op: Op) -> float:
    """2 x multiplications of a product for each token; padding between experts does not count."""
    if op.name not in PRODUCTS:
        return 0.0
    if op.name.startswith("grouped"):
        rows = run.seq_len * run.config.experts_per_token
        outputs = rows * op.result.shape[-1]
    elif op.name == ATTENTION:
        # Queries x keys x widths of a key and of a value.
        q, k, v = op.operands
        outputs = math.prod(q.shape[:3]) * (k.shape[-1] + v.shape[-1])
    else:
        outputs = math.prod(op.result.shape)
    return 2.0 * outputs * op.contracted * op.times / run.seq_len


def op_row(run: Run, op: Op) -> dict[str, Any]:
    """An operation as a row."""
    return {
        "part": op.part or "model",
        "operation": f"{MEANING.get(op.name, op.name)} {op.label}".strip(),
        "weight": ", ".join(name.partition(".")[2] for name in op.arguments if "." in name),
        "operands": " ".join(map(str, op.operands)),
        "result": str(op.result),
        "computes in": op.computes,
        "times": op.times,
        "MFLOP/token": flops_per_token(run, op) / 1e6 if op.name in PRODUCTS else None,
    }


def shortened(run: Run, ops: list[Op]) -> list[dict[str, Any]]:
    """Rows by part; elementwise operations of one dtype are one row, changes of layout another."""
    parts = dict.fromkeys(part_of(op) for op in ops)
    rows = []
    for part in parts:
        sums: dict[tuple[str, str], Counter[str]] = {}
        for op in ops:
            if part_of(op) != part:
                continue
            if op.name in LISTED or op.name in PRODUCTS or is_kernel(op):
                rows.append(op_row(run, op))
                continue
            kind = ("layout and casts", "-") if op.name in LAYOUT else ("elementwise", op.computes)
            sums.setdefault(kind, Counter())[op.name] += op.times
        for (kind, computes), names in sorted(sums.items()):
            words = ", ".join(f"{n} {name}" for name, n in names.most_common(4))
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            rows.append({"part": part, "operation": kind, "operands": words + more,
                         "computes in": computes, "times": names.total()})
    return [{**dict.fromkeys(op_row(run, ops[0])), **row} for row in rows]


def is_kernel(op: Op) -> bool:
    """Whether an operation is a kernel or a call into a library rather than a primitive of XLA."""
    return op.label == program.KERNEL or "call" in op.name or "wrapper" in op.name


def part_rows(run: Run, parameters: list[dict], ops: list[Op]) -> list[dict[str, Any]]:
    """Parameters and products of each part of the model, its layers added up."""
    rows = []
    total = sum(flops_per_token(run, op) for op in ops)
    for part in dict.fromkeys(part_of(op) for op in ops):
        inside = [op for op in ops if part_of(op) == part]
        products = [op for op in inside if op.name in PRODUCTS]
        flops = sum(flops_per_token(run, op) for op in products)
        others = [op.computes for op in inside if op.name in LISTED and "f" in op.computes]
        held = [row for row in parameters if row["part"] == part]
        rows.append({
            "part": part,
            "parameters": sum(row["parameters"] for row in held),
            "bytes": sum(row["bytes"] for row in held),
            "products in": ", ".join(dict.fromkeys(op.computes for op in products)) or None,
            "norms, softmax, sums in": ", ".join(dict.fromkeys(others)) or None,
            "MFLOP/token": flops / 1e6,
            "share": flops / total,
        })
    return rows


def total_row(run: Run, args: ExplainArgs, parameters: list[dict], ops: list[Op]) -> dict[str, Any]:
    """Sums over the model, and the published formula beside the products that were counted."""
    counts = param_counts(run.config)
    flops = sum(flops_per_token(run, op) for op in ops)
    router = sum(flops_per_token(run, op) for op in ops if "router" in op.part)
    formula = train_flops_per_token(run.config, run.seq_len, causal=False, mtp=True) / 3
    return {
        "parameters": counts.total,
        "without MTP": counts.total_without_mtp,
        "active per token": counts.active,
        "bytes of parameters": sum(row["bytes"] for row in parameters),
        "kernels of": args.device or jax.devices()[0].device_kind,
        "forward FLOP per token": flops,
        "of which router": router,
        "formula without router": formula,
    }
