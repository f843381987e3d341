"""Safetensors files: a header parser that trusts nothing, mapped reads, and a streaming writer.

A file is eight bytes of header length (little endian), a JSON header and the bytes of the tensors,
one after another without gaps.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The limit of the format's own library.
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: what the header says of it, checked."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or rows of its first dimension, as a read-only view of the file.

        The pages leave memory when the array does.
        """
        first, last, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (max(last - first, 0), *self.shape[1:]) if self.shape else ()
        dtype = DTYPES[self.dtype]
        count = math.prod(shape)
        if count == 0:
            return np.zeros(shape, dtype)
        begin = self.offset + first * math.prod(self.shape[1:]) * dtype.itemsize
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < begin + count * dtype.itemsize:
                raise ValueError(f"{self.file} has become shorter: copy it again")
            mapped = mmap.mmap(
                file.fileno(), begin - page + count * dtype.itemsize, access=mmap.ACCESS_READ,
                offset=page,
            )
        return np.frombuffer(mapped, dtype, count, begin - page).reshape(shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
      ValueError: the file is not a whole safetensors file; the message says where it is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise ValueError(
                f"{path} is not a whole safetensors file: {size} bytes, header of {length}"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is damaged: not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map names to strings")
    tensors = {
        name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()
    }
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a gap after"
            raise ValueError(f"{path}: tensor {tensor.name} {what} the one before it")
        end += tensor.num_bytes
    if end != size:
        raise ValueError(f"{path} has {size} bytes, its header accounts for {end}")
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate name {next(n for n in names if names.count(n) > 1)!r}")
    return found


def _no_constant(text: str):
    raise ValueError(f"{text} is no number")


def _tensor(path: Path, name: str, entry: object, begin: int, size: int) -> Tensor:
    """One entry of a header whose data begin at `begin` in a file of `size` bytes."""
    where = f"{path}: tensor {name!r}"
    if not name or not name.isprintable():
        raise ValueError(f"{where} has an empty or unprintable name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 8:
        raise ValueError(f"{where} has shape {shape!r}: not a short list of sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has data_offsets {offsets!r}: not two positions")
    first, last = offsets
    if not first <= last <= size - begin:
        raise ValueError(f"{where} lies at {first}..{last}, the file holds {size - begin} bytes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != needed:
        raise ValueError(
            f"{where} of shape {tuple(shape)} {dtype} needs {needed} bytes, has {last - first}"
        )
    return Tensor(path, name, dtype, tuple(shape), begin + first, needed)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def dtype_name(dtype: np.dtype) -> str:
    """The header's name of a numpy dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_header(file, specs: Iterable[Spec]) -> None:
    """Writes the header of a file whose data are to follow in the order of `specs`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def write_file(path: Path, specs: list[Spec], arrays: Iterator[np.ndarray]) -> None:
    """Writes a file tensor by tensor; it appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write_header(file, specs)
            for spec, array in zip(specs, arrays, strict=True):
                assert array.shape == spec.shape and array.dtype == DTYPES[spec.dtype], spec
                file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
