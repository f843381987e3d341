"""Three tables from dimension letter to mesh axes, and how a spec is read off a name with them.

A table is an ordered list of (letter, axes). Each letter of an array takes, in the order of the
table, those of its axes that no earlier letter of the same array took and whose sizes divide it.
"""

from collections.abc import Mapping

from jax.sharding import PartitionSpec

Table = tuple[tuple[str, tuple[str, ...]], ...]

# Masters, moments, gradients, checkpoints: nothing big stays replicated.
STORE: Table = (
    ("E", ("expert",)),
    ("N", ("tensor",)),
    ("F", ("tensor",)),
    ("V", ("tensor",)),
    ("D", ("fsdp", "expert")),
    ("Q", ("fsdp", "expert")),
    ("C", ("fsdp", "expert")),
)

# Weights as a layer's products see them, after the gather over fsdp.
COMPUTE: Table = (
    ("E", ("expert",)),
    ("N", ("tensor",)),
    ("F", ("tensor",)),
    ("V", ("tensor",)),
)

# Activations. T carries the batch where B was folded into it.
BATCH_AXES = ("data", "fsdp", "expert")
ACTIVATIONS: Table = (
    ("B", BATCH_AXES),
    ("T", BATCH_AXES),
    ("N", ("tensor",)),
    ("F", ("tensor",)),
    ("V", ("tensor",)),
)

# Every device scores its tokens against all experts, so the router keeps E whole.
EXCEPTIONS = {"router_ED": "D"}


def letters_of(name: str) -> str:
    """The dimension letters at the end of an array's name: "w_gate_EFD" -> "EFD"."""
    return name.rsplit("_", 1)[-1]


def spec(
    letters: str, shape: tuple[int, ...], table: Table, axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """The PartitionSpec of an array whose last dimensions are `letters`; earlier ones are whole."""
    entries: list[tuple[str, ...] | str | None] = [None] * len(shape)
    first = len(shape) - len(letters)
    used: set[str] = set()
    for letter, axes in table:
        if letter not in letters or (letter == "T" and table is ACTIVATIONS and "B" in letters):
            continue
        dim = first + letters.index(letter)
        taken: list[str] = []
        size = 1
        for axis in axes:
            free = axis in axis_sizes and axis not in used
            if free and shape[dim] % (size * axis_sizes[axis]) == 0:
                taken.append(axis)
                size *= axis_sizes[axis]
        used.update(taken)
        if taken:
            entries[dim] = taken[0] if len(taken) == 1 else tuple(taken)
    return PartitionSpec(*entries)


def weight_spec(
    name: str, shape: tuple[int, ...], table: Table, axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """The PartitionSpec of a named weight. Vectors (norms) are small and stay whole."""
    letters = letters_of(name)
    split = EXCEPTIONS.get(name, letters) if len(letters) > 1 else ""
    return spec(split, shape, table, axis_sizes)
