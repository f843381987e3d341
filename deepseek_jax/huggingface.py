"""Models from and to released checkpoints of the DeepSeek-V2 and V3 families.

A tensor is read when its bytes are needed: each device is given its own part of each array, and
the host holds no more than that.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_jax.complete_folder import complete_folder, write_json
from deepseek_jax.config import Precision
from deepseek_jax.huggingface_blocks import E4M3, dequantize, quantize
from deepseek_jax.huggingface_checkpoint import (
    INDEX,
    SCALE,
    Checkpoint,
    check_copies,
    open_checkpoint,
)
from deepseek_jax.huggingface_config import config_record
from deepseek_jax.huggingface_names import Entry, entries
from deepseek_jax.layers import RoutingBias
from deepseek_jax.model import Model
from deepseek_jax.stored import is_stored
from deepseek_jax.tensor_files import DTYPES, Spec, write_file
from sharding.rules import STORE, weight_spec

Format = Literal["fp8", "bf16", "fp32"]
STORED = {"fp32": "F32", "bf16": "BF16"}
# A file of an export holds as many tensors as fit in this many bytes.
LARGEST_FILE = 5 * 10**9


def load_huggingface(
    path: str | os.PathLike,
    *,
    precision: str | Precision = "fp32",
    mesh: jax.sharding.Mesh | None = None,
    allow_nan: bool = False,
) -> Model:
    """The model of a checkpoint folder, MTP modules included.

    Args:
      precision: weights are converted to the dtype that it stores them in.
      mesh: where to put them; each device reads its own shards only.
      allow_nan: go on when a tensor holds NaN or infinite values.

    Raises:
      ValueError: the checkpoint is damaged, or not one of a model of this family.
    """
    checkpoint = open_checkpoint(path)
    check_copies(checkpoint)
    make = lambda: Model(checkpoint.config, precision=precision, rngs=nnx.Rngs(0))
    graphdef, *states = nnx.split(nnx.eval_shape(make), nnx.Param, RoutingBias)
    loaded = []
    for state in states:
        tree = nnx.to_pure_dict(state)
        read = lambda path, leaf: load_leaf(checkpoint, path, leaf, mesh, allow_nan=allow_nan)
        loaded.append(
            nnx.State(jax.tree_util.tree_map_with_path(read, tree, is_leaf=is_stored))
        )
    return nnx.merge(graphdef, *loaded)


def load_leaf(checkpoint: Checkpoint, path, leaf, mesh, *, allow_nan: bool) -> Any:
    """A parameter, or a routing bias, in the dtype and kind of an abstract one."""
    name = dotted(path)
    if mesh is None:
        where = whole = SingleDeviceSharding(jax.devices()[0])
    else:
        split = weight_spec(path[-1].key, leaf.shape, STORE, mesh.shape)
        where, whole = NamedSharding(mesh, split), NamedSharding(mesh, PartitionSpec())
    if not is_stored(leaf):
        return load_array(checkpoint, name, leaf.dtype, where, allow_nan=allow_nan)
    codes = load_array(checkpoint, name, E4M3, where, allow_nan=allow_nan)
    scale = jax.device_put(checkpoint.scales(name, allow_nan=allow_nan), whole)
    return dataclasses.replace(leaf, codes=codes, scale=scale)


def load_array(
    checkpoint: Checkpoint, path: str, dtype, sharding, *, allow_nan: bool = False
) -> jax.Array:
    """One of our arrays; no more than one shard of it is on the host at a time."""
    shape = checkpoint.array_shape(path)
    shards: list[jax.Array] = []
    last: tuple[Any, Any] = (None, None)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or ()
        if last[0] != index:
            last = None, None  # leaves the host before the next one is made
            last = index, checkpoint.fill(path, index, np.dtype(dtype), allow_nan=allow_nan)
        shards.append(jax.block_until_ready(jax.device_put(last[1], device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def dotted(path) -> str:
    """A tree path as "moe.ffn.router_ED"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def save_huggingface(
    model: Model,
    path: str | os.PathLike,
    *,
    format: Format = "bf16",
    tokenizer: str | os.PathLike | None = None,
    bos: int | None = None,
    eos: int | Sequence[int] | None = None,
) -> None:
    """Writes a checkpoint folder: shards, index, config.json, and a copy of a tokenizer.json.

    The folder appears under its name when it is complete. Norms, routers, embedding and head stay
    in BF16 in the format "fp8", routing biases in FP32 in all of them.

    Args:
      bos: the token that texts begin with, for config.json; None where there is none.
      eos: the token or tokens that end a text. Without one readers do not stop by themselves.

    Raises:
      ValueError: the folder exists, the format is not known, or config.json has no word for a
        field of the model.
      OSError: the tokenizer cannot be read, or the folder not be written.
    """
    if format not in get_args(Format):
        raise ValueError(f"{format=} must be one of {get_args(Format)}")
    path = Path(path)
    record = config_record(model.config, format=format)
    record |= {"bos_token_id": bos, "eos_token_id": eos if eos is None else np.array(eos).tolist()}
    with complete_folder(path) as folder:
        write_json(folder / "config.json", dict(sorted(record.items())))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.json")
        shards = plan_shards(list(export_specs(model.config, format)))
        arrays = export_arrays(model, format)
        for name, specs in shards.items():
            write_file(folder / name, specs, (next(arrays) for _ in specs))
        write_index(folder, shards)


def specs_of(entry: Entry, format: Format) -> list[Spec]:
    """What an entry is written as: one tensor, or codes and scales."""
    if entry.array.endswith("bias_E"):
        return [Spec(entry.name, "F32", entry.shape)]
    if format == "fp8" and entry.may_be_fp8:
        scale = tuple(-(-n // 128) for n in entry.shape)
        return [Spec(entry.name, "F8_E4M3", entry.shape), Spec(entry.name + SCALE, "F32", scale)]
    return [Spec(entry.name, STORED.get(format, "BF16"), entry.shape)]


def export_specs(config, format: Format) -> Iterator[Spec]:
    """Every tensor of an export in order."""
    for entry in entries(config):
        yield from specs_of(entry, format)


def export_arrays(model: Model, format: Format) -> Iterator[np.ndarray]:
    """The arrays of `export_specs`; one layer's array is on the host at a time."""
    tree: dict = {}
    for kind in (nnx.Param, RoutingBias):
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            nnx.to_pure_dict(nnx.state(model, kind)), is_leaf=is_stored
        ):
            tree[dotted(path)] = leaf
    held: tuple[Any, Any] = (None, None)
    for entry in entries(model.config):
        value = tree[entry.array]
        if entry.index:
            if held[0] != (entry.array, entry.index[0]):
                of_layer = jax.tree.map(lambda leaf, l=entry.index[0]: np.asarray(leaf[l]), value)
                held = (entry.array, entry.index[0]), of_layer
            value = jax.tree.map(lambda leaf, e=entry.index[1:]: leaf[e], held[1])
        yield from encode(value, entry, specs_of(entry, format))


def encode(value: Any, entry: Entry, specs: list[Spec]) -> Iterator[np.ndarray]:
    """A parameter of one layer and expert in the dtypes that it is written in."""
    if is_stored(value):
        codes, scale = np.asarray(value.codes).reshape(entry.shape), np.asarray(value.scale)
        if len(specs) == 2:
            yield from (codes, scale)
            return
        value = dequantize(codes, scale, slice(None), slice(None))
    array = np.asarray(value).reshape(entry.shape)
    if len(specs) == 2:
        yield from quantize(array)
    else:
        yield array.astype(DTYPES[specs[0].dtype])


def plan_shards(specs: list[Spec], largest: int = LARGEST_FILE) -> dict[str, list[Spec]]:
    """Files of about equal names and at most `largest` bytes, tensors in order."""
    files: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.num_bytes > largest:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.num_bytes
    total = len(files)
    return {
        f"model-{number:05}-of-{total:05}.safetensors": file
        for number, file in enumerate(files, start=1)
    }


def write_index(folder: Path, shards: dict[str, list[Spec]]) -> None:
    size = sum(spec.num_bytes for specs in shards.values() for spec in specs)
    weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
