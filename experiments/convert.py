"""`convert`: checkpoints of released weights from one format to another, and what is in them."""

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_jax.complete_folder import check_absent, complete_folder, write_json
from deepseek_jax.huggingface import STORED, plan_shards, save_huggingface, write_index
from deepseek_jax.huggingface_blocks import dequantize, is_finite, quantize
from deepseek_jax.huggingface_checkpoint import INDEX, SCALE, Checkpoint, open_checkpoint
from deepseek_jax.huggingface_config import QUANTIZATION, tied
from deepseek_jax.tensor_files import DTYPES, Spec, Tensor, write_file
from experiments.eval import load_run, run_tokenizer, trained_model
from experiments.models import is_checkpoint
from experiments.run_directory import RunDirectory

# Beside the weights, what makes a checkpoint usable: tokenizer, chat template, licence.
KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".md")
LISTED = "name shape dtype place sha256".split()
COLUMNS = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()


@dataclass(frozen=True)
class ConvertArgs:
    """Write a checkpoint in another format, or export a run; list what a checkpoint holds.

    A conversion that was interrupted goes on where it stopped when it is started again. Its folder
    has its name once it is complete.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of released weights, or directory of a run."""
    destination: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder to write; without one, the source is only checked."""
    format: Literal["fp8", "bf16", "fp32"] | None = None
    """Of matrices in the destination; by default the source's, byte for byte, of a run bf16."""
    audit: bool = False
    """List every tensor: name, shape, dtype, where it goes."""
    checksums: bool = False
    """With --audit, also the SHA-256 of every tensor as stored."""
    allow_nan: bool = False
    """Go on where a tensor holds NaN or infinite values."""
    json: Path | None = None
    """Write what --audit lists to this file."""


def convert(args: ConvertArgs) -> None:
    """Checks, lists and writes."""
    if args.destination is not None:
        check_absent(args.destination)
    if not is_checkpoint(args.source) and (args.source / "checkpoints").is_dir():
        export_run(args)
        return
    checkpoint = open_checkpoint(args.source)
    if args.audit or args.json is not None:
        listed = []
        for row in audit(checkpoint, checksums=args.checksums):
            if args.audit:
                print("\t".join(row))
            listed.append(dict(zip(LISTED, row, strict=False)))
        if args.json is not None:
            write_json(args.json, listed)
    print(summary(checkpoint))
    if args.destination is not None:
        write_converted(checkpoint, args.destination, args.format, allow_nan=args.allow_nan)
        print(f"written to {args.destination}")


def export_run(args: ConvertArgs) -> None:
    """A run's model and tokenizer as a checkpoint folder."""
    if args.destination is None:
        raise ValueError(f"{args.source} is a run: name the folder to export it to")
    if args.audit or args.checksums or args.json is not None:
        raise ValueError(
            f"--audit, --checksums and --json list a checkpoint, but {args.source} is a run: "
            "export it first, then list what was written"
        )
    directory = RunDirectory(args.source)
    given = {}
    if directory.tokenizer.is_file():
        given = {"tokenizer": directory.tokenizer, "eos": run_tokenizer(directory).eos}
    model = trained_model(*load_run(directory))
    save_huggingface(model, args.destination, format=args.format or "bf16", **given)
    print(f"written to {args.destination}")


def audit(checkpoint: Checkpoint, *, checksums: bool = False) -> Iterator[tuple[str, ...]]:
    """Rows of name, shape, dtype, place in our arrays, and checksum when asked."""
    for name, tensor in checkpoint.tensors.items():
        entry = checkpoint.entries.get(name.removesuffix(SCALE))
        if name in checkpoint.unused:
            place = checkpoint.unused[name]
        else:
            place = f"{entry.array}{list(entry.index) if entry.index else ''}"
            place += " scale" * name.endswith(SCALE)
        row = (name, "x".join(map(str, tensor.shape)), tensor.dtype, place)
        yield (*row, checksum(tensor)) if checksums else row


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, a few rows in memory at a time."""
    digest = hashlib.sha256()
    if tensor.num_bytes:
        count = tensor.shape[0] if tensor.shape else 1
        rows = max(1, count * 2**26 // tensor.num_bytes)
        for begin in range(0, count, rows):
            part = tensor.read(slice(begin, begin + rows))
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def summary(checkpoint: Checkpoint) -> str:
    """One line on all tensors."""
    size: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        size[tensor.dtype] = size.get(tensor.dtype, 0) + tensor.num_bytes
    parts = ", ".join(f"{n / 1e9:,.3f} GB in {dtype}" for dtype, n in size.items())
    files = len({tensor.file for tensor in checkpoint.tensors.values()})
    return (
        f"{len(checkpoint.tensors):,} tensors in {files} files, {parts}; every tensor has its "
        f"place, {len(checkpoint.unused)} are not read"
    )


def write_converted(
    checkpoint: Checkpoint, destination: Path, format: str | None, *, allow_nan: bool = False
) -> None:
    """Writes shard by shard; whole shards of an attempt that was interrupted are kept."""
    outputs = list(conversions(checkpoint, format, allow_nan))
    makers = {spec.name: make for spec, make in outputs}
    shards = plan_shards([spec for spec, _ in outputs])
    total = sum(spec.num_bytes for spec, _ in outputs)
    with complete_folder(destination, plan=plan_of(checkpoint, format)) as folder:
        with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"writing {destination.name}", total=total)

            def arrays(specs: list[Spec]) -> Iterator[np.ndarray]:
                for spec in specs:
                    yield makers[spec.name]()
                    progress.advance(task, spec.num_bytes)

            for name, specs in shards.items():
                if (folder / name).is_file():
                    progress.advance(task, sum(spec.num_bytes for spec in specs))
                else:
                    write_file(folder / name, specs, arrays(specs))
        write_index(folder, shards)
        write_json(folder / "config.json", converted_record(checkpoint, format))
        for path in sorted(checkpoint.directory.iterdir()):
            ours = path.name in ("config.json", INDEX)
            if path.is_file() and path.suffix in KEPT_SUFFIXES and not ours:
                shutil.copyfile(path, folder / path.name)


def plan_of(checkpoint: Checkpoint, format: str | None) -> dict[str, Any]:
    """What must be the same for a conversion to go on."""
    files = {tensor.file.name: tensor.file for tensor in checkpoint.tensors.values()}
    sizes = {name: [path.stat().st_size, path.stat().st_mtime] for name, path in files.items()}
    return {"format": format, "source": str(checkpoint.directory.resolve()), "files": sizes}


def conversions(
    checkpoint: Checkpoint, format: str | None, allow_nan: bool
) -> Iterator[tuple[Spec, Callable[[], np.ndarray]]]:
    """Every tensor to be written, and a function that makes it."""
    stored = {entry.name: entry for entry in checkpoint.entries.values()}
    if tied(checkpoint.record):
        stored.pop("lm_head.weight")
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored:
            continue
        scale = checkpoint.tensors.get(name + SCALE)
        entry = stored.get(name)
        finite = functools.partial(checked, tensor, allow_nan)
        if format is None or (format == "fp8" and scale is not None):
            yield Spec(name, tensor.dtype, tensor.shape), finite
            if scale is not None:
                scales = functools.partial(checked, scale, allow_nan)
                yield Spec(scale.name, scale.dtype, scale.shape), scales
            continue
        if entry is None and name in checkpoint.unused and tensor.num_bytes == 0:
            continue
        values = functools.partial(plain_values, tensor, scale, allow_nan)
        if format == "fp8" and entry is not None and entry.may_be_fp8:
            # One matrix gives two tensors, written one after the other.
            both = functools.lru_cache(maxsize=1)(lambda values=values: quantize(values()))
            blocks = tuple(-(-n // 128) for n in tensor.shape)
            yield Spec(name, "F8_E4M3", tensor.shape), lambda both=both: both()[0]
            yield Spec(name + SCALE, "F32", blocks), lambda both=both: last(both)
            continue
        dtype = "F32" if name.endswith("bias") else STORED.get(format, "BF16")
        cast = lambda values=values, dtype=dtype: values().astype(DTYPES[dtype])
        yield Spec(name, dtype, tensor.shape), cast


def checked(tensor: Tensor, allow_nan: bool) -> np.ndarray:
    """The tensor as stored, which must be finite."""
    array = tensor.read()
    if not allow_nan and not is_finite(array):
        raise ValueError(f"tensor {tensor.name} holds NaN or infinite values: --allow-nan goes on")
    return array


def plain_values(tensor: Tensor, scale: Tensor | None, allow_nan: bool) -> np.ndarray:
    """The numbers that a tensor stands for, FP32 where it is in FP8 blocks."""
    array = checked(tensor, allow_nan)
    if scale is None:
        return array
    return dequantize(array, checked(scale, allow_nan), slice(None), slice(None))


def last(both) -> np.ndarray:
    """The scales, after which the matrix is not needed any more."""
    scale = both()[1]
    both.cache_clear()
    return scale


def converted_record(checkpoint: Checkpoint, format: str | None) -> dict[str, Any]:
    """config.json of the destination: the source's, but for the format."""
    record = dict(checkpoint.record)
    if format is None:
        return record
    record.pop("quantization_config", None)
    for field in ("torch_dtype", "dtype"):
        if field in record:
            record[field] = "float32" if format == "fp32" else "bfloat16"
    return record | ({"quantization_config": QUANTIZATION} if format == "fp8" else {})
