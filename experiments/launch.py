"""`launch`: trains a recipe, from text on disk to a report one can read."""

import contextlib
import dataclasses
import hashlib
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from deepseek_jax.checkpoint import Checkpoints
from deepseek_jax.config import Precision, Run, to_json
from deepseek_jax.counts import param_counts
from experiments import agreement, hosts, processes, supervision
from experiments.assignments import assigned
from experiments.command_line import program
from experiments.data import TokenShards, is_shards, prepare
from experiments.devices import Devices, MeshArgs, check_mesh, devices_of, make_cpu_devices
from experiments.display import TrainingDisplay
from experiments.eval import recorded_shards
from experiments.finish import finish, tokenizer_of, write_report_if_possible
from experiments.imported import imported_run
from experiments.planning.setup import mesh_of, named_sizes
from experiments.recipes import recipe
from experiments.run_directory import RunDirectory, check_unchanged, hash_of
from experiments.submit import submit
from experiments.train import Stopped, batch_source, first_state, model_summary, train
from sharding.mesh import all_axes


@dataclass(frozen=True)
class LaunchArgs(MeshArgs):
    """Train a recipe. Without one, `tiny` learns the Python standard library in minutes.

    The run's directory holds its configuration, metrics, checkpoints, tokenizer, a summary and
    report.html. Ctrl-C saves; --resume goes on as if nothing had happened.
    """

    recipe: Annotated[str | None, tyro.conf.Positional] = None
    """tiny, hundred_million, peer or deepseek_v3. When resuming, the run's own."""
    run: Path | None = None
    """Directory of the run; runs/RECIPE-DATE by default."""
    resume: bool = False
    """Go on from the last complete checkpoint of --run."""
    imported: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Train on from a folder of released weights, whose sizes replace the recipe's."""
    steps: int | None = None
    """Number of steps; the recipe's schedules stretch with it where they depend on it."""
    seed: int | None = None
    """Seed of weights and data order."""
    data: tuple[str, ...] | None = None
    """Text, JSONL (.gz, .zst), Parquet, folders of them, or token shards."""
    tokenizer: str | None = None
    """A tokenizer.json; otherwise one is trained on the data."""
    precision: str | None = None
    """fp32, bf16 or fp8."""
    combine: str | None = None
    """bf16, logfmt8 or logfmt10: what experts' results travel in to other devices."""
    set: tuple[str, ...] = ()
    """FIELD=VALUE of the Run, such as --set config.num_experts=32 remat=paper."""
    profile: tuple[int, int] | None = None
    """Record a profile of the steps after the first number up to the second."""
    json: Path | None = None
    """Also write the summary to this file."""
    processes: int | None = None
    """Processes on this machine. Slurm's srun and the manifest of --submit say so themselves."""
    submit: Literal["slurm", "k8s"] | None = None
    """Write a batch script or a JobSet manifest of this command, and submit it."""
    nodes: int = 1
    """Hosts to submit to."""
    image: str | None = None
    """Container image of the JobSet."""
    volume: str | None = None
    """CLAIM=PATH: a volume claim that its pods share, for data and for --run below PATH."""
    dry_run: bool = False
    """Only print what --submit would submit."""


def launch(args: LaunchArgs) -> None:
    """Trains in this process, in several that it starts and watches, or as a job it submits."""
    place = hosts.here()
    if place is None and args.submit is not None:
        check_submitted(args)
        submit(args.submit, nodes=args.nodes, devices=args.devices_per_node, image=args.image,
               volume=args.volume, words=sys.argv[1:], dry_run=args.dry_run)
        return
    group = hosts.group(args.processes) if place is None else []
    if group:
        code = supervision.supervise(group, ["-m", "experiments", *sys.argv[1:]])
        if code:
            raise SystemExit(code)
        return
    make_cpu_devices(args.mesh, processes=place.count if place else 1)
    if place is not None:
        processes.join(place)
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(tempfile.TemporaryDirectory())
        if place is None:
            stack.enter_context(sigterm_interrupts())
        run_here(args, Path(aside))


def check_submitted(args: LaunchArgs) -> None:
    """Refuses here what every host would refuse after it has waited for its turn."""
    if args.volume is not None and args.run is not None:
        mounted = Path(args.volume.partition("=")[2])
        if not args.run.is_relative_to(mounted):
            raise ValueError(f"--run {args.run} must lie below {mounted}, or it goes with its pod")
    if args.resume or args.imported is not None:
        return  # what they name may lie where the hosts are
    run, _, _ = plan(args)
    if args.mesh is not None:
        count = args.nodes * (args.devices_per_node or 0)
        sizes = mesh_of(args.mesh, count) if count else named_sizes(args.mesh)
        check_mesh(run, all_axes(sizes), run.micro_batch)


def run_here(args: LaunchArgs, aside: Path) -> None:
    """Plans the run, prepares its data and trains; the other processes write to `aside`."""
    run, name, directory = plan(args)
    if not args.resume:
        check_profile(args.profile, begin=0, steps=run.steps)
    agreement.on_configuration(run)
    if not processes.is_first():
        directory = RunDirectory(directory.path, aside=aside)
    devices = devices_of(args, run, batch=run.micro_batch)
    with contextlib.ExitStack() as stack:
        with processes.first_before_others("data") as first:
            if first:
                stack.enter_context(directory.held())
                if not args.resume:
                    directory.check_new()
            shards = training_tokens(run, directory, resume=args.resume)
        agreement.on_data(shards)
        train_on(args, run, name, directory, shards, devices)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends what goes before and after training as Ctrl-C does; a second one kills."""

    def interrupt(signum, frame):
        signal.signal(signum, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_on(
    args: LaunchArgs, run: Run, name: str, directory: RunDirectory, shards: TokenShards,
    devices: Devices,
) -> None:
    """Trains, scores the validation text, samples and writes the report."""
    source = batch_source(run, shards)
    checkpoints = Checkpoints(directory.checkpoints, keep=run.keep_checkpoints)
    imported = recorded_import(args, directory)
    if args.resume:
        directory.check_resumable(checkpoints.latest)
        if checkpoints.latest is None:
            print(f"{directory.checkpoints} holds no checkpoint yet: training begins again")
    state = first_state(run, checkpoints, devices.mesh, imported=imported)
    checkpoints.check_room(state)
    check_profile(args.profile, begin=int(state.step), steps=run.steps)
    record = describe(args, run, name, directory, shards)
    kept = args.resume and directory.tokenizer.exists()
    if processes.is_first() and not kept and shards.tokenizer_file is not None:
        directory.write_tokenizer(shards.tokenizer_file)
    display = TrainingDisplay(run.steps)
    try:
        state = train(
            run,
            state,
            directory,
            checkpoints,
            source,
            display,
            devices,
            record=record,
            bytes_per_token=shards.train.num_bytes / shards.train.num_tokens,
            header=header(run, name, directory, record, shards, devices),
            profile=args.profile,
        )
    except Stopped as stopped:
        print(
            f"saved after step {stopped.step} of {run.steps}; go on with: "
            f"{resume_words(directory)}"
        )
        # The report of what there is, so that an interrupted run can be looked at.
        if processes.is_first():
            write_report_if_possible(directory)
        raise SystemExit(128 + stopped.signum) from None
    try:
        with devices.for_any_load().scope():
            finish(run, directory, shards, state, args.json)
    except KeyboardInterrupt:
        print(f"all {run.steps} steps are saved; score them with: {resume_words(directory)}")
        raise


def resume_words(directory: RunDirectory) -> str:
    """The command that goes on with a run."""
    return f"{program()} launch --run {shlex.quote(str(directory.path))} --resume"


def plan(args: LaunchArgs) -> tuple[Run, str, RunDirectory]:
    """The Run to train, the name of its recipe and where its results go."""
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    if args.resume:
        if args.imported is not None:
            raise ValueError("--resume goes on with a run: leave out --from")
        if args.run is None:
            raise ValueError("--resume needs --run: the directory of the run to go on with")
        directory = RunDirectory(args.run)
        recorded, name = directory.read_run(), directory.read_config()["recipe"]
        if args.recipe is not None:
            run = recipe(args.recipe)(args.steps or recorded.steps)
        else:
            run = dataclasses.replace(recorded, steps=args.steps or recorded.steps)
        run = override(run, args)
        check_unchanged(recorded, run, named=args.recipe)
        check_rate(recorded, run)
        return run, name, directory
    name = (args.recipe or "tiny").replace("-", "_")
    run = recipe(name)(args.steps)
    if args.imported is not None:
        run = imported_run(run, args.imported)
    before, run = run.config, override(run, args)
    if args.imported is not None and run.config != before:
        raise ValueError(
            f"--set cannot change config: its sizes are those of --from {args.imported}"
        )
    path = args.run or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return run, name, RunDirectory(processes.texts(str(path))[0])


def recorded_import(args: LaunchArgs, directory: RunDirectory) -> str | None:
    """The released weights that the run started from."""
    if args.resume:
        return directory.read_config().get("imported")
    return None if args.imported is None else str(args.imported.resolve())


def training_tokens(run: Run, directory: RunDirectory, *, resume: bool) -> TokenShards:
    """The tokens of the run to resume, or those made from the data into a new directory."""
    if resume:
        tokenizer_of(directory)  # refused before anything is trained
        return recorded_shards(directory)
    if processes.is_first():
        print(f"preparing data in {directory.data}", flush=True)
    shards, _ = prepare(
        run.data,
        directory=directory.data,
        vocab_size=run.config.vocab_size,
        tokenizer_file=run.tokenizer,
        field=run.text_field,
    )
    if run.tokenizer is not None:
        given = hashlib.sha256(Path(run.tokenizer).read_bytes()).hexdigest()
        if given != shards.tokenizer_hash:
            raise ValueError(
                f"the tokenizer {run.tokenizer} ({given[:12]}) did not make the given shards "
                f"({shards.tokenizer_hash[:12]}): leave out --tokenizer"
            )
    if shards.vocab_size > run.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {shards.vocab_size} tokens, the model only "
            f"vocab_size={run.config.vocab_size}: --set config.vocab_size={shards.vocab_size}"
        )
    return shards


def check_rate(recorded: Run, run: Run) -> None:
    """Raises when steps were added to a run whose learning rate is 0 by then."""
    rate = run.learning_rate.at(float(run.position_at(run.steps - 1) * run.seq_len))
    if run.steps > recorded.steps and rate == 0:
        raise ValueError(
            f"--steps {run.steps} goes beyond the schedule of this run, whose learning rate ends "
            f"at 0 after {recorded.steps} steps: start another --run with --steps {run.steps}, or "
            "train on with --from, after `convert` has exported this one"
        )


def check_profile(profile: tuple[int, int] | None, *, begin: int, steps: int) -> None:
    """Raises when the steps to profile are not among those to come."""
    if profile is not None and not begin <= profile[0] < profile[1] <= steps:
        raise ValueError(
            f"--profile {profile[0]} {profile[1]} must be two rising steps from {begin} to "
            f"{steps}"
        )


def override(run: Run, args: LaunchArgs) -> Run:
    """The run with what the command line says of it."""
    changes: dict[str, Any] = {}
    for field in ("seed", "tokenizer"):
        if getattr(args, field) is not None:
            changes[field] = getattr(args, field)
    if args.data is not None:
        if not args.data:
            raise ValueError("--data needs a path; without --data the text is Python's library")
        changes["data"] = args.data
    if args.precision is not None:
        changes["precision"] = Precision.of(args.precision)
    if args.combine is not None:
        precision = changes.get("precision", run.precision)
        changes["precision"] = dataclasses.replace(precision, combine=args.combine)
    run = dataclasses.replace(run, **changes)
    return assigned(run, args.set)


def describe(
    args: LaunchArgs, run: Run, name: str, directory: RunDirectory, shards: TokenShards
) -> dict[str, Any]:
    """What config.json holds: enough to make the run again and to check that it is the same."""
    counts = param_counts(run.config)
    ready = [str(Path(path).resolve()) for path in run.data if is_shards(path)]
    made = [] if ready and len(ready) == len(run.data) else [directory.data.name]
    stored = made + ready
    command = f"{program()} {shlex.join(sys.argv[1:])}"
    if args.resume:
        recorded = directory.read_config()
        # Paths of data are of the folder that the run was started in.
        stored = recorded["shards"]
        # Only a resume that changes something is needed to make the run again.
        same = recorded["run"] == to_json(run)
        command = recorded["command"] if same else f"{recorded['command']} && {command}"
    return {
        "recipe": name,
        "command": command,
        "imported": recorded_import(args, directory),
        "run": to_json(run),
        "run_hash": hash_of(to_json(run)),
        "corpus": {"hash": shards.corpus_hash, "documents": shards.train.num_documents,
                   "tokens": shards.train.num_tokens, "bytes": shards.train.num_bytes},
        "tokenizer": shards.tokenizer_hash,
        "shards": stored,
        "parameters": {"total": counts.total, "active": counts.active},
        "devices": [jax.devices()[0].device_kind],
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def header(
    run: Run, name: str, directory: RunDirectory, record, shards: TokenShards, devices: Devices
) -> list[tuple[str, Any]]:
    """What the run is about to do, before it does it."""
    counts = record["parameters"]
    sequences = [run.accumulation_at(t) * run.micro_batch for t in (0, int(run.batch_size.length))]
    per_step = " to ".join(f"{n * run.seq_len:,}" for n in dict.fromkeys(sequences))
    seen = run.position_at(run.steps) * run.seq_len / max(shards.train.num_tokens, 1)
    return [
        ("recipe", name),
        ("model", model_summary(run.config)),
        ("parameters", f"{counts['total']:,} in all, {counts['active']:,} active per token"),
        ("device", str(devices)),
        ("precision", ", ".join(f"{k} {v}" for k, v in to_json(run.precision).items() if v)),
        ("data", f"{shards.train.num_documents:,} documents, {shards.train.num_bytes / 1e6:.1f} "
                 f"MB, {shards.train.num_tokens:,} tokens; {seen:.1f} passes"),
        ("step", f"{per_step} tokens, {run.steps:,} steps"),
        ("results", str(directory.path)),
    ]
