"""A checkpoint on disk, opened and checked against the model that its config.json describes."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.huggingface_blocks import E4M3, blocks, dequantize, is_finite
from deepseek_jax.huggingface_config import check_quantization, interleaved, model_config, tied
from deepseek_jax.huggingface_names import Entry, computed, copies, entries, sizes
from deepseek_jax.tensor_files import Tensor, read_header
from sharding.rules import letters_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor has its place, every place its tensor; only the numbers are unread."""

    directory: Path
    record: dict[str, Any]  # config.json
    config: ModelConfig
    tensors: dict[str, Tensor]
    entries: dict[str, Entry]  # by released name; a tied head is the embedding
    unused: dict[str, str]  # tensors that are not read, and why

    def source(self, entry: Entry) -> Tensor:
        """The stored tensor of an entry."""
        name = entry.name
        if entry.array == "head_VD" and tied(self.record):
            name = "model.embed_tokens.weight"
        return self.tensors[name]

    def scale(self, entry: Entry) -> Tensor | None:
        """The stored scales of an entry in FP8 blocks."""
        return self.tensors.get(entry.name + SCALE)

    def read(
        self,
        entry: Entry,
        rows: slice = slice(None),
        columns: slice = slice(None),
        *,
        codes: bool = False,
    ) -> np.ndarray:
        """A window of a tensor in the dtype it is stored in; FP32 where it is in FP8 blocks.

        Args:
          codes: leave FP8 blocks as they are.
        """
        tensor, scale = self.source(entry), self.scale(entry)
        if codes and (scale is None or not interleaved(self.record)):
            raise ValueError(
                f"weights='fp8' keep FP8 blocks as they are stored, and {entry.name} is "
                f"{tensor.dtype}: use weights='bf16', or convert the checkpoint to fp8"
                if scale is None
                else "weights='fp8' need rotary pairs stored side by side: use weights='bf16'"
            )
        if scale is not None and not codes:
            return dequantize(tensor.read(), scale.read(), rows, columns)
        array = tensor.read(rows)
        return array[:, columns] if array.ndim == 2 else array

    def fill(
        self, path: str, index: tuple[slice, ...], dtype: np.dtype, *, allow_nan: bool = False
    ) -> np.ndarray:
        """A window of one of our arrays, made from the tensors that hold it.

        Args:
          index: slices of the whole array, layers and experts first.
          dtype: with E4M3, the codes of FP8 blocks as they are stored.
        """
        own = self.by_array(path)
        shape = self.array_shape(path)
        bounds = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
        out = np.empty([last - first for first, last in bounds], dtype)
        lead = len(own[0].index)
        window = bounds[lead:]
        for entry in own:
            at = [i - first for i, (first, _) in zip(entry.index, bounds, strict=False)]
            if all(0 <= a < n for a, n in zip(at, out.shape, strict=False)):
                piece = self.piece(entry, path, shape[lead:], window, codes=dtype == E4M3)
                if not allow_nan and not is_finite(piece):
                    raise ValueError(
                        f"tensor {entry.name} holds NaN or infinite values: repair it, or allow "
                        "them"
                    )
                out[tuple(at)] = piece.astype(dtype)
        return out

    def piece(self, entry: Entry, path: str, dims, window, *, codes: bool = False) -> np.ndarray:
        """A window of one released tensor in the shape and order of our array."""
        letters = letters_of(path)[-len(dims) :] if dims else ""
        # Read whole: what lies within a head, and a dimension whose rotary part is put in order.
        read = list(window)
        if len(dims) == 3:
            inner = letters.index("N") + 1
            read[inner] = (0, dims[inner])
        rotary = not interleaved(self.record) and letters in ("NAD", "NAQ", "YD")
        axis = letters.index("Y" if "Y" in letters else "A") if rotary else 0
        if rotary:
            read[axis] = (0, dims[axis])
        rows, columns = slice(*read[0]), slice(None)
        if len(dims) == 2:
            columns = slice(*read[1])
        elif len(dims) == 3:
            merged = slice(*(head * dims[inner] for head in read[inner - 1]))
            rows, columns = (merged, slice(*read[2])) if inner == 1 else (rows, merged)
        array = self.read(entry, rows, columns, codes=codes)
        array = array.reshape([last - first for first, last in read])
        if rotary:
            array = pairs_from_halves(array, axis, self.config.rotary_head_dim)
        cut = (slice(*(at - first for at in part))
               for part, (first, _) in zip(window, read, strict=True))  # fmt: skip
        return array[tuple(cut)]

    def scales(self, path: str, *, allow_nan: bool = False) -> np.ndarray:
        """The scales of all blocks of one of our arrays in FP8, layers and experts first."""
        own = self.by_array(path)
        lead = [max(entry.index[i] for entry in own) + 1 for i in range(len(own[0].index))]
        stored = np.stack([self.scale(entry).read().astype(np.float32) for entry in own])
        for entry, scale in zip(own, stored, strict=True):
            if not allow_nan and not is_finite(scale):
                raise ValueError(
                    f"tensor {entry.name + SCALE} holds NaN or infinite values: repair it, or "
                    "allow them"
                )
        return stored.reshape(*lead, *stored.shape[1:])

    def by_array(self, path: str) -> list[Entry]:
        """The entries that make up one of our arrays."""
        return self._arrays[path]

    def array_shape(self, path: str) -> tuple[int, ...]:
        """The shape of one of our arrays."""
        return self._shapes[path]

    def __post_init__(self):
        arrays: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            arrays.setdefault(entry.array, []).append(entry)
        object.__setattr__(self, "_arrays", arrays)
        object.__setattr__(
            self, "_shapes", {path: _shape(self.config, own) for path, own in arrays.items()}
        )


def _shape(config: ModelConfig, own: list[Entry]) -> tuple[int, ...]:
    path, lead = own[0].array, len(own[0].index)
    letters, of = letters_of(path), sizes(config, path)
    counts = [max(entry.index[i] for entry in own) + 1 for i in range(min(lead, 1))]
    return (*counts, *(of[letter] for letter in letters))


def pairs_from_halves(array: np.ndarray, axis: int, R: int) -> np.ndarray:
    """Moves the last R rows of an axis from (first halves, second halves) to pairs side by side."""
    n = array.shape[axis]
    rotary = np.arange(n - R, n).reshape(2, R // 2).T.reshape(-1)
    return np.take(array, np.concatenate((np.arange(n - R), rotary)), axis=axis)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads config.json and every header, and checks that they fit each other.

    Raises:
      ValueError: something is missing, unknown, twice there, of another shape or unreadable.
    """
    directory = Path(path)
    record = read_json(directory / "config.json")
    config, quantized = model_config(record), check_quantization(record)
    tensors = stored_tensors(directory)
    if config.num_mtp:
        # Exports without their MTP modules often announce them all the same.
        prefixes = tuple(f"model.layers.{config.num_layers + k}." for k in range(config.num_mtp))
        if not any(name.startswith(prefixes) for name in tensors):
            config = dataclasses.replace(config, num_mtp=0)
    wanted = {entry.name: entry for entry in entries(config)}
    unused = {}
    for name, array in copies(config).items():
        if name in tensors:
            unused[name] = f"copy of {array}"
    for name in computed(config):
        if name in tensors:
            unused[name] = "computed from config.json"
    if config.num_shared_experts == 0:
        unused |= {n: "empty" for n, t in tensors.items() if ".shared_experts." in n
                   and t.num_bytes == 0}
    if tied(record) and "lm_head.weight" in tensors:
        unused["lm_head.weight"] = "copy of embed_VD"
    check_places(directory, tensors, wanted, unused, quantized=quantized, tied=tied(record))
    return Checkpoint(directory, record, config, tensors, wanted, unused)


def check_copies(checkpoint: Checkpoint) -> None:
    """Raises when a tensor that should repeat the embedding or the head differs from it."""
    own = {entry.array: checkpoint.source(entry) for entry in checkpoint.entries.values()
           if not entry.index}  # fmt: skip
    for name, reason in checkpoint.unused.items():
        if not reason.startswith("copy of "):
            continue
        copy, original = checkpoint.tensors[name], own[reason.removeprefix("copy of ")]
        same = copy.dtype == original.dtype and copy.shape == original.shape
        for begin in range(0, copy.shape[0] if same else 0, 4096):
            rows = slice(begin, begin + 4096)
            same = same and copy.read(rows).tobytes() == original.read(rows).tobytes()
        if not same:
            raise ValueError(f"tensor {name} differs from {original.name}, which it must repeat")


def check_places(directory, tensors, wanted, unused, *, quantized: bool, tied: bool) -> None:
    """Raises unless every tensor has a place of its shape and dtype, and every place a tensor."""
    for name, tensor in tensors.items():
        if name in unused:
            continue
        base = name.removesuffix(SCALE)
        entry = wanted.get(base)
        if entry is None or (tied and name == "lm_head.weight"):
            raise ValueError(f"{tensor.file}: unknown tensor {name} of shape {tensor.shape}")
        if base != name:
            scaled = tensors.get(base)
            if scaled is None or scaled.dtype != "F8_E4M3":
                raise ValueError(f"{tensor.file}: {name} is the scale of no FP8 tensor")
            shape = tuple(blocks(n) for n in entry.shape)
            if tensor.shape != shape or tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{tensor.file}: {name} is {tensor.dtype} {tensor.shape}, must be F32 {shape}"
                )
            continue
        if tensor.shape != entry.shape:
            raise ValueError(
                f"{tensor.file}: {name} has shape {tensor.shape}, config.json asks for "
                f"{entry.shape}"
            )
        if tensor.dtype == "F8_E4M3":
            if not quantized:
                raise ValueError(
                    f"{tensor.file}: {name} is in FP8, but config.json has no quantization_config"
                )
            if len(entry.shape) != 2 or base + SCALE not in tensors:
                raise ValueError(f"{tensor.file}: {name} is in FP8 and has no {base}{SCALE}")
        elif tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.file}: {name} is {tensor.dtype}: use {', '.join(FLOATS)} or F8_E4M3"
            )
    missing = [name for name in wanted if name not in tensors
               and not (tied and name == "lm_head.weight")]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{directory}: tensor {missing[0]} is missing{more}")


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of all files of a checkpoint, which its index must name completely."""
    if not (directory / INDEX).exists():
        if not (directory / SINGLE).is_file():
            raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
        return read_header(directory / SINGLE)
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{directory / INDEX}: weight_map must map tensors to files")
    tensors: dict[str, Tensor] = {}
    files = list(dict.fromkeys(index.values()))
    for file in files:
        # A name with a folder in it could lead anywhere.
        if Path(file).name != file or not (directory / file).is_file():
            raise ValueError(f"{directory / INDEX} names the file {file!r}, which is not there")
    for file in files:
        for name, tensor in read_header(directory / file).items():
            if name in tensors:
                raise ValueError(
                    f"tensor {name} is there twice, in {tensors[name].file.name} and {file}"
                )
            if index.get(name) != file:
                raise ValueError(f"tensor {name} of {directory / file} is not in {INDEX} as such")
            tensors[name] = tensor
    absent = [name for name in index if name not in tensors]
    if absent:
        raise ValueError(f"tensor {absent[0]} is in {INDEX} but not in {index[absent[0]]}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: name the folder of a checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value
