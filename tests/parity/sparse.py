"""Write a checkpoint of DeepSeek-V3's true names, shapes and dtypes in files that take no room.

Run `python -m tests.parity.sparse FOLDER` in the root of the project. 163 files of 688 GB in all,
every byte of the tensors 0; which tensor lies in which file is ours.
"""

import json
import sys
from pathlib import Path

import numpy as np

from deepseek_jax import configs
from deepseek_jax.config import ModelConfig
from deepseek_jax.huggingface import specs_of
from deepseek_jax.huggingface_config import config_record
from deepseek_jax.huggingface_names import copies, entries, released_shape
from deepseek_jax.tensor_files import Spec, write_header

FILES = 163


def released_specs(config: ModelConfig) -> list[Spec]:
    """Every tensor of an FP8 release, the copies of embedding and head in MTP layers included."""
    specs = [spec for entry in entries(config) for spec in specs_of(entry, "fp8")]
    shared = {name: released_shape(config, array) for name, array in copies(config).items()}
    return specs + [Spec(name, "BF16", shape) for name, shape in shared.items()]


def write_sparse(folder: Path, config: ModelConfig, files: int = FILES) -> int:
    """Writes the folder; returns the bytes that its files seem to have."""
    folder.mkdir(parents=True)
    specs = released_specs(config)
    ends = np.cumsum([spec.num_bytes for spec in specs])
    number_of = np.minimum((ends - 1) * files // ends[-1], files - 1)
    weight_map, size = {}, 0
    for number in range(files):
        inside = [spec for spec, n in zip(specs, number_of, strict=True) if n == number]
        name = f"model-{number + 1:05}-of-{files:06}.safetensors"
        with (folder / name).open("wb") as file:
            write_header(file, inside)
            file.truncate(file.tell() + sum(spec.num_bytes for spec in inside))
        size += (folder / name).stat().st_size
        weight_map |= dict.fromkeys((spec.name for spec in inside), name)
    index = {"metadata": {"total_size": int(ends[-1])}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_record(config, format="fp8")))
    return size


if __name__ == "__main__":
    print(f"{write_sparse(Path(sys.argv[1]), configs.deepseek_v3()):,} bytes, nearly none on disk")
