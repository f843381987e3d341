"""The weights of a run as a mesh holds them: what each device stores, multiplies with, gathers.

Everything here is read off names, shapes and the letter tables, before anything is compiled.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from deepseek_jax.config import ModelConfig, Run
from deepseek_jax.counts import abstract_model
from deepseek_jax.fp8 import sides
from experiments.planning.setup import itemsize
from sharding.mesh import AXES, all_axes
from sharding.rules import COMPUTE, STORE, is_router, letters_of, spec, weight_spec

# The model multiplies with these whole, whatever the compute table says of V.
TABLES = ("embed_VD", "head_VD")


class Weight(NamedTuple):
    """One parameter, its layers stacked; mesh axes of size 1 are left out."""

    name: str  # dotted path
    shape: tuple[int, ...]
    stored: tuple[str, ...]  # mesh axes that masters, moments and gradients are split over
    computed: tuple[str, ...]  # those that products see it split over
    mesh: tuple[str, ...]  # all of them
    shard: tuple[int, ...]  # the shape of what a device stores

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def letters(self) -> str:
        return letters_of(self.leaf)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layers(self) -> int:
        return self.shape[0] if len(self.shape) > len(self.letters) else 1

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes over which it is gathered before use, first to last, and its gradient scattered."""
        return tuple(axis for axis in self.stored if axis not in self.computed)

    @property
    def summed(self) -> tuple[str, ...]:
        """Axes over which its gradient is added up and stays whole."""
        # Sequences lie along the tensor axis, so devices of it have different tokens too.
        return tuple(
            axis for axis in self.mesh if axis not in self.gathered and axis not in self.computed
        )

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied with it: no norm, no lookup."""
        return len(self.letters) > 1 and self.leaf != "embed_VD"

    @property
    def part(self) -> str:
        """The part of the model that a table lists it under."""
        if self.name.startswith("mtp."):
            return "MTP"
        if self.leaf in TABLES:
            return "embedding" if self.leaf == "embed_VD" else "head and loss"
        if ".attention." in self.name:
            return "attention"
        if self.leaf.endswith(("_EFD", "_EDF")):
            return "routed experts"
        if is_router(self.leaf):
            return "router"
        if ".shared." in self.name:
            return "shared experts"
        return "dense layers" if ".ffn." in self.name else "norms"

    def flops(self, config: ModelConfig) -> float:
        """Operations of the product of one token with it, all layers together."""
        if not self.is_matrix:
            return 0.0
        routed = self.leaf.endswith(("_EFD", "_EDF"))
        used = config.experts_per_token / config.num_experts if routed else 1.0
        return 2.0 * self.size * used


def weights(config: ModelConfig, mesh: Mapping[str, int]) -> tuple[Weight, ...]:
    """The parameters of a model on a mesh, given by the sizes of its axes."""
    return _weights(config, tuple(all_axes(mesh).values()))


@functools.cache
def _weights(config: ModelConfig, mesh: tuple[int, ...]) -> tuple[Weight, ...]:
    sizes, found = dict(zip(AXES, mesh, strict=True)), []
    above = lambda axes: tuple(axis for axis in axes if sizes[axis] > 1)
    for name, shape in shapes(config):
        leaf = name.rpartition(".")[2]
        places = lambda table, leaf=leaf, shape=shape: _entries(
            weight_spec(leaf, shape, table, sizes)
        )
        stored, computed = places(STORE), places(() if leaf in TABLES else COMPUTE)
        shard = tuple(
            n // shards(entry, sizes)
            for n, entry in itertools.zip_longest(shape, stored, fillvalue=())
        )
        split = lambda entries: above(itertools.chain.from_iterable(entries))
        found.append(Weight(name, shape, split(stored), split(computed), above(AXES), shard))
    return tuple(found)


@functools.cache
def shapes(config: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a model's parameters, in the order of the tree."""
    params = nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param))
    return tuple(
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    )


def parameter_bytes(run: Run, mesh: Mapping[str, int]) -> int:
    """Bytes of FP32 masters on a device."""
    return sum(4 * w.size // shards(w.stored, mesh) for w in weights(run.config, mesh))


def optimizer_bytes(run: Run, mesh: Mapping[str, int]) -> int:
    """Bytes of both moments, and of the moving average where there is one, on a device."""
    each = sum(optimizer_itemsizes(run))
    return sum(each * w.size // shards(w.stored, mesh) for w in weights(run.config, mesh))


def optimizer_itemsizes(run: Run) -> tuple[int, ...]:
    """Bytes of an element of each array that the optimizer keeps beside a master."""
    moment = itemsize(run.precision.moments)
    return (moment, moment, *([4] if run.ema_decay is not None else []))


def shards(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    """Into how many parts the axes split an array."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def code_axes(
    weight: Weight, mesh: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes over which FP8 codes, and transposed codes, are gathered before use.

    Codes are matrices of rows filled up to 16 and columns up to 128, and lie as such: where heads
    and their channels are one dimension, more axes divide it.
    """
    sizes = dict(zip(weight.letters, weight.shape[-len(weight.letters) :], strict=True))
    lead, outputs, contracted = sides(weight.letters)
    rows, columns = (math.prod(sizes[letter] for letter in side) for side in (outputs, contracted))
    up = lambda n, multiple: -(-n // multiple) * multiple
    first, n, k = tuple(sizes[letter] for letter in lead), outputs[0], contracted[0]
    found = []
    for letters, shape in (
        (lead + n + k, (*first, up(rows, 16), up(columns, 128))),
        (lead + k + n, (*first, up(columns, 16), up(rows, 128))),
    ):
        axes = itertools.chain.from_iterable(_entries(spec(letters, shape, STORE, mesh)))
        found.append(tuple(a for a in axes if mesh[a] > 1 and a not in weight.computed))
    return tuple(found)


def _entries(where: PartitionSpec) -> list[tuple[str, ...]]:
    """The axes of each dimension; of several the last counts fastest and goes first."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in where]
    return [tuple(reversed(entry)) for entry in entries]
