"""Three tables from dimension letter to mesh axes, and how a spec is read off a name with them.

A table is an ordered list of (letter, axes); a letter may come again. Each letter of an array
takes, in the order of the table, those of its axes that no earlier letter of the same array took
and that divide what is left of it.
"""

import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

Table = tuple[tuple[str, tuple[str, ...]], ...]

TENSOR: Table = (
    ("E", ("expert",)),
    ("N", ("tensor",)),
    ("F", ("tensor",)),
    ("V", ("tensor",)),
)
# Masters, moments, gradients, checkpoints: nothing stays replicated where an axis could hold it.
# D first, which nearly all have; 7168 divides by 32 and by 64, not by both.
STORE: Table = (*TENSOR, *((letter, ("fsdp", "expert")) for letter in "DQCFNVYZXAUE"))

# Weights as a layer's products see them, after the gather over fsdp.
COMPUTE: Table = TENSOR

# Activations as products see them. T carries the batch where B was folded into it.
BATCH_AXES = ("data", "fsdp", "expert")
PRODUCTS: Table = (
    ("B", BATCH_AXES),
    ("T", BATCH_AXES),
    ("N", ("tensor",)),
    ("F", ("tensor",)),
    ("V", ("tensor",)),
)
# Between those that split heads or hidden channels over the tensor axis the sequence lies on it.
ACTIVATIONS: Table = (*PRODUCTS, ("T", ("tensor",)))


def letters_of(name: str) -> str:
    """The dimension letters at the end of an array's name: "w_gate_EFD" -> "EFD"."""
    return name.rsplit("_", 1)[-1]


def is_router(name: str) -> bool:
    """Whether a parameter makes scores of experts: it is multiplied with in FP32, whatever the
    recipe, and every device scores its tokens against all experts."""
    return name.startswith("router_")


def spec(
    letters: str, shape: tuple[int, ...], table: Table, axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """The PartitionSpec of an array whose last dimensions are `letters`; earlier ones are whole."""
    entries: list[list[str]] = [[] for _ in shape]
    first = len(shape) - len(letters)
    used: set[str] = set()
    for letter, axes in table:
        folded = letter == "T" and axes is BATCH_AXES
        if letter not in letters or (folded and "B" in letters):
            continue
        dim = first + letters.index(letter)
        size = math.prod(axis_sizes[axis] for axis in entries[dim])
        for axis in axes:
            free = axis in axis_sizes and axis not in used
            if free and shape[dim] % (size * axis_sizes[axis]) == 0:
                entries[dim].append(axis)
                used.add(axis)
                size *= axis_sizes[axis]
    return PartitionSpec(
        *(axes[0] if len(axes) == 1 else tuple(axes) if axes else None for axes in entries)
    )


def weight_spec(
    name: str, shape: tuple[int, ...], table: Table, axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """The PartitionSpec of a named weight. Vectors (norms) are small and stay whole."""
    letters = letters_of(name)
    if table is COMPUTE and is_router(name):
        letters = letters.replace("E", "_")
    return spec(letters if len(letters) > 1 else "", shape, table, axis_sizes)
