"""`launch`: trains a recipe, from text on disk to a report one can read."""

import dataclasses
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from deepseek_jax.config import Precision, Run, from_json, to_json
from deepseek_jax.counts import param_counts
from deepseek_jax.generate import stream
from deepseek_jax.training import TrainState
from experiments.command_line import program
from experiments.data.batches import BatchSource
from experiments.data import prepare
from experiments.data.shards import TokenShards, text_bytes
from experiments.data.tokenizer import Tokenizer
from experiments.display import TrainingDisplay, duration
from experiments.eval import compressors, score, trained_model
from experiments.recipes import recipe
from experiments.run_directory import RunDirectory, check_unchanged
from experiments.tables import print_table, write_json
from experiments.train import Stopped, model_summary, train

SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class LaunchArgs:
    """Train a recipe. Without one, `tiny` learns the Python standard library in minutes.

    The run's directory holds its configuration, metrics, checkpoints, tokenizer, a summary and
    report.html. Ctrl-C saves; --resume goes on as if nothing had happened.
    """

    recipe: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the recipe: tiny, peer, deepseek_v3. When resuming, the run's own."""
    run: Path | None = None
    """Directory of the run; runs/RECIPE-DATE by default."""
    resume: bool = False
    """Go on from the last complete checkpoint of --run."""
    steps: int | None = None
    """Number of steps; the recipe's schedules stretch with it where they depend on it."""
    seed: int | None = None
    """Seed of weights and data order."""
    data: tuple[str, ...] | None = None
    """Text, JSONL (.gz, .zst), Parquet, folders of them, or token shards."""
    tokenizer: str | None = None
    """A tokenizer.json; otherwise one is trained on the data."""
    precision: str | None = None
    """fp32 or bf16."""
    set: tuple[str, ...] = ()
    """FIELD=VALUE of the Run, such as --set config.num_experts=32 remat=paper."""
    profile: tuple[int, int] | None = None
    """Record a profile of the steps after the first number up to the second."""
    json: Path | None = None
    """Also write the summary to this file."""


def launch(args: LaunchArgs) -> None:
    """Prepares data, trains, scores the validation text, samples and writes the report."""
    run, name, directory = plan(args)
    if not args.resume:
        directory.create()
    print(f"preparing data in {directory.data}", flush=True)
    shards, corpus = prepare(
        run.data,
        directory=directory.data,
        vocab_size=run.config.vocab_size,
        tokenizer_file=run.tokenizer,
    )
    check_vocabulary(run, shards)
    record = describe(args, run, name, directory, shards, corpus)
    if args.resume:
        check_same_data(directory.read_config(), record)
    elif shards.tokenizer_file is not None:
        directory.tokenizer.write_bytes(shards.tokenizer_file.read_bytes())
    directory.write_config(record)
    source = BatchSource(
        shards,
        seq_len=run.seq_len,
        seed=run.seed,
        fim_rate=run.fim_rate,
        segments=run.mask_documents,
    )
    display = TrainingDisplay(run.steps)
    began = time.perf_counter()
    try:
        state = train(
            run,
            directory,
            source,
            display,
            bytes_per_token=shards.train.num_bytes / shards.train.num_tokens,
            header=header(run, name, record, shards),
            profile=args.profile,
        )
    except Stopped as stopped:
        print(
            f"saved after step {stopped.step} of {run.steps}; go on with: "
            f"{program()} launch --run {shlex.quote(str(directory.path))} --resume"
        )
        # The report of what there is, so that an interrupted run can be looked at.
        write_report_if_possible(directory)
        raise SystemExit(128 + stopped.signum) from None
    finish(args, run, directory, shards, state, seconds=time.perf_counter() - began)


def plan(args: LaunchArgs) -> tuple[Run, str, RunDirectory]:
    """The Run to train, the name of its recipe and where its results go."""
    if args.resume:
        if args.run is None:
            raise ValueError("--resume needs --run: the directory of the run to go on with")
        directory = RunDirectory(args.run)
        record = directory.read_config()
        recorded = from_json(Run, record["run"])
        name = record["recipe"]
        if args.recipe is None:
            run = recorded if args.steps is None else dataclasses.replace(
                recorded, steps=args.steps
            )
        else:
            run = recipe(args.recipe)(args.steps)
        run = override(run, args)
        check_unchanged(recorded, run)
        return run, name, directory
    name = (args.recipe or "tiny").replace("-", "_")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    run = override(recipe(name)(args.steps), args)
    path = args.run or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return run, name, RunDirectory(path)


def override(run: Run, args: LaunchArgs) -> Run:
    """The run with what the command line says of it."""
    changes: dict[str, Any] = {}
    for field in ("seed", "tokenizer"):
        if getattr(args, field) is not None:
            changes[field] = getattr(args, field)
    if args.data is not None:
        changes["data"] = args.data
    if args.precision is not None:
        changes["precision"] = Precision.of(args.precision)
    run = dataclasses.replace(run, **changes)
    for assignment in args.set:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} must be FIELD=VALUE")
        run = replace_field(run, field.split("."), text, field)
    return run


def replace_field(value: Any, path: list[str], text: str, field: str) -> Any:
    """A dataclass with one field, found by its dotted path, parsed from text."""
    names = [f.name for f in dataclasses.fields(value)]
    name = path[0].replace("-", "_")
    if name not in names:
        raise ValueError(f"unknown field {field}: {type(value).__name__} has {', '.join(names)}")
    current = getattr(value, name)
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise ValueError(f"field {field} goes into {name}, which is {current!r}")
        return dataclasses.replace(
            value, **{name: replace_field(current, path[1:], text, field)}
        )
    kind = type(value).__annotations__[name]
    return dataclasses.replace(value, **{name: parse_value(kind, text, field)})


def parse_value(kind: Any, text: str, field: str) -> Any:
    """Text as a value of a field's type; a number for a Schedule is a constant one."""
    from deepseek_jax.config import Schedule

    try:
        if kind is Schedule:
            return Schedule.constant(float(text))
        if kind is Precision:
            return Precision.of(text)
        return tyro.cli(kind, args=[text], console_outputs=False)
    except (ValueError, SystemExit) as error:
        shown = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{field}={text!r} is not a {shown}") from error


def check_vocabulary(run: Run, shards: TokenShards) -> None:
    if shards.vocab_size > run.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {shards.vocab_size} tokens, the model only "
            f"vocab_size={run.config.vocab_size}: --set config.vocab_size={shards.vocab_size}"
        )


def describe(args, run: Run, name: str, directory: RunDirectory, shards, corpus) -> dict[str, Any]:
    """What config.json holds: enough to make the run again and to check that it is the same."""
    counts = param_counts(run.config)
    paths = [directory.data] if corpus is not None else [Path(p).resolve() for p in run.data]
    return {
        "recipe": name,
        "command": shlex.join([program(), *sys.argv[1:]]),
        "run": to_json(run),
        "corpus": {"hash": shards.corpus_hash, "documents": shards.train.num_documents,
                   "tokens": shards.train.num_tokens, "bytes": shards.train.num_bytes},
        "tokenizer": shards.tokenizer_hash,
        "shards": [str(p.name) if p == directory.data else str(p) for p in paths],
        "parameters": {"total": counts.total, "active": counts.active},
        "devices": [jax.devices()[0].device_kind],
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def check_same_data(recorded: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises when a resumed run would see other tokens than the run it goes on with."""
    for what, old, new in (
        ("data", recorded["corpus"]["hash"], record["corpus"]["hash"]),
        ("tokenizer", recorded["tokenizer"], record["tokenizer"]),
    ):
        if old != new:
            raise ValueError(
                f"the {what} ({new[:12]}) does not match the checkpoint's ({old[:12]}): resume "
                f"with the same {what}, or start another --run"
            )


def header(run: Run, name: str, record, shards: TokenShards) -> list[tuple[str, Any]]:
    """What the run is about to do, before it does it."""
    counts = record["parameters"]
    sequences = [run.accumulation_at(t) * run.micro_batch for t in (0, int(run.batch_size.length))]
    per_step = " to ".join(f"{n * run.seq_len:,}" for n in dict.fromkeys(sequences))
    device = jax.devices()[0]
    seen = run.position_at(run.steps) * run.seq_len / max(shards.train.num_tokens, 1)
    return [
        ("recipe", name),
        ("model", model_summary(run.config)),
        ("parameters", f"{counts['total']:,} in all, {counts['active']:,} active per token"),
        ("device", f"1 x {device.device_kind} ({device.platform}), no mesh"),
        ("precision", ", ".join(f"{k} {v}" for k, v in to_json(run.precision).items())),
        ("data", f"{shards.train.num_documents:,} documents, {shards.train.num_bytes / 1e6:.1f} "
                 f"MB, {shards.train.num_tokens:,} tokens; {seen:.1f} passes"),
        ("step", f"{per_step} tokens, {run.steps:,} steps"),
    ]


def finish(
    args, run: Run, directory: RunDirectory, shards: TokenShards, state: TrainState, *, seconds
) -> None:
    """Scores the validation text, samples, writes the summary and the report."""
    summary: dict[str, Any] = {
        "steps": int(state.step),
        "tokens": run.position_at(run.steps) * run.seq_len,
        "skipped": int(state.skipped),
        "train_seconds": round(seconds, 1),
    }
    if shards.validation.num_documents:
        figures = score(run, state, shards, shards.validation, batch_size=run.micro_batch)
        summary |= {
            "val_bits_per_byte": figures["bits_per_byte"],
            "val_loss": figures["loss"],
            "val_tokens": figures["tokens"],
            "val_bytes": figures["bytes"],
        }
    tokenizer = tokenizer_of(directory)
    if tokenizer is not None:
        if shards.validation.num_documents:
            summary |= compressors(text_bytes(shards.validation, tokenizer))
        prompt = sample_prompt(shards, tokenizer)
        text = continue_text(run, state, tokenizer, prompt, seed=run.seed)
        summary["sample"] = {"prompt": prompt, "text": text}
    write_json(directory.summary, summary)
    row = {k: v for k, v in summary.items() if k != "sample"}
    print_table([row], title="result", json_path=None)
    if args.json is not None:
        write_json(args.json, summary)
    if "sample" in summary:
        print(f"\nsample\n{summary['sample']['prompt']}{summary['sample']['text']}\n")
    path = write_report_if_possible(directory)
    if path is not None:
        print(f"report   {path}")
    print(f"trained in {duration(seconds)}; results in {directory.path}")


def tokenizer_of(directory: RunDirectory) -> Tokenizer | None:
    """The run's tokenizer; None where none came with the data or tokenizers is not installed."""
    if not directory.tokenizer.exists():
        return None
    try:
        from experiments.data.tokenizer import load_tokenizer

        return load_tokenizer(directory.tokenizer)
    except ImportError:
        return None


def sample_prompt(shards: TokenShards, tokenizer: Tokenizer) -> str:
    """The first words of a validation document."""
    split = shards.validation if shards.validation.num_documents else shards.train
    return tokenizer.decode(split.read(0, min(16, int(split.ends_J[0]) - 1)))


def continue_text(run: Run, state: TrainState, tokenizer, prompt: str, *, seed: int) -> str:
    """A continuation of the prompt, drawn at temperature 0.7, up to the end of the document."""
    tokens = tokenizer.encode(prompt)[-(run.seq_len // 2) :]
    if not len(tokens):
        tokens = np.asarray([tokenizer.eos])
    new = []
    room = min(SAMPLE_TOKENS, run.config.max_length - len(tokens))
    model = trained_model(run, state)
    for token_B in stream(
        model, np.asarray(tokens, np.int32)[None], max_new_tokens=room, temperature=0.7,
        key=jax.random.key(seed),
    ):
        if int(token_B[0]) == tokenizer.eos:
            break
        new.append(int(token_B[0]))
    return tokenizer.decode(new)


def write_report_if_possible(directory: RunDirectory) -> Path | None:
    """report.html, or None where matplotlib is not installed."""
    try:
        from experiments.report import write_report

        return write_report(directory.path)
    except ImportError:
        return None


