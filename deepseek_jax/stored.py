"""Weights that rest in FP8 blocks, as released: a product reads them dequantised, layer by layer.

Codes and scales stay those of the checkpoint, so that they can be written back byte for byte.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.fp8 import TILE, is_in_fp8, sides
from pallas_kernels.rounding import to_fp8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredWeight:
    """Codes in the shape of the weight; scales [..., m, k] of blocks of its matrix."""

    codes: jax.Array
    scale: jax.Array
    letters: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})  # of what products read

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def __getitem__(self, index) -> jax.Array:
        """What products read, when a module asks for its parameter by an ellipsis."""
        if index is not Ellipsis:
            raise TypeError(f"a weight stored in FP8 is read whole, not by {index}")
        rows, columns = matrix_shape(self.letters, self.shape)
        wide = jnp.repeat(jnp.repeat(self.scale, TILE, axis=-1)[..., :columns], TILE, axis=-2)
        codes = self.codes.reshape(*self.scale.shape[:-2], rows, columns)
        values = codes.astype(jnp.float32) * wide[..., :rows, :]
        return values.reshape(self.shape).astype(self.dtype)


def matrix_shape(letters: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrix that a weight is for its products and its blocks."""
    _, outputs, contracted = sides(letters)
    split = len(shape) - len(contracted)
    return math.prod(shape[split - len(outputs) : split]), math.prod(shape[split:])


def is_stored(weight: Any) -> bool:
    return isinstance(weight, StoredWeight)


def may_be_stored(name: str) -> bool:
    """Whether released FP8 checkpoints keep the parameter of a name in FP8."""
    return is_in_fp8(name) and name != "w_join_DZ"


def store(master: jax.Array, letters: str, dtype: Any) -> StoredWeight:
    """A weight in blocks: scale = max(max |w|, 1e-4) / 448."""
    rows, columns = matrix_shape(letters, master.shape)
    lead, _, _ = sides(letters)
    head = master.shape[: master.ndim - len(letters) + len(lead)]
    flat = master.astype(jnp.float32).reshape(*head, rows, columns)
    pad = ((0, 0),) * len(head) + ((0, -rows % TILE), (0, -columns % TILE))
    tiles = jnp.pad(flat, pad).reshape(*head, -(-rows // TILE), TILE, -(-columns // TILE), TILE)
    scale = jnp.maximum(jnp.max(jnp.abs(tiles), axis=(-3, -1)), 1e-4) / 448.0
    codes = to_fp8(tiles / scale[..., :, None, :, None])
    codes = codes.reshape(*head, pad[-2][1] + rows, pad[-1][1] + columns)[..., :rows, :columns]
    return StoredWeight(codes.reshape(master.shape), scale, letters, dtype)
