"""Text from a model: greedy or drawn, whole or as a stream, drafted by MTP modules or not.

Everything a call compiles depends on the batch and on the capacity of the cache, a power of two:
three programs, whatever the lengths of prompts and texts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.decoding import (
    Decoding,
    advance,
    as_read,
    chunk_width,
    is_as_read,
    prefill,
)
from deepseek_jax.drafting import first_ahead
from deepseek_jax.few_rows import MOST_SUMMED
from deepseek_jax.latent_cache import check_format, empty_cache
from deepseek_jax.model import Model
from deepseek_jax.sampling import Sampling
from pallas_kernels.mosaic import target
from sharding.placement import current_mesh, current_scheme, scope, under_mesh
from sharding.rules import ACTIVATIONS, letters_of, spec

# With its last two names, which are no default, XLA makes one CUDA graph of all steps: after each
# the host would take as long as ten kernels.
ONE_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
    "DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
SMALLEST_CAPACITY = 256
ALL_STEPS = 2**30


@dataclass(frozen=True)
class Report:
    """What a generation took, beside its tokens."""

    tokens: int  # new ones, of all texts
    steps: int
    row_steps: int
    accepted: int
    draft_depth: int
    cache_bytes: int

    @property
    def acceptance(self) -> float:
        """Kept drafts of all drafts made."""
        return self.accepted / max(self.row_steps * self.draft_depth, 1)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(self.row_steps, 1)


# The programs.


@functools.lru_cache
def _begin(shape, config, format, draft, dtype, mesh) -> Callable[..., Decoding]:
    """The program that makes the state of texts [B, S]: every array where the mesh wants it."""

    def make(tokens_BS, length_B, limit_B, key) -> Decoding:
        return Decoding(
            tokens_BS=tokens_BS,
            length_B=length_B,
            limit_B=limit_B,
            done_B=jnp.zeros(shape[:1], bool),
            cache=empty_cache(config, *shape, format),
            ahead=first_ahead(config, length_B, shape[1], format, dtype) if draft else None,
            key=key,
            counts_I=jnp.zeros((3,), jnp.int32),
            lost=jnp.zeros((), jnp.int32),
        )

    if mesh is None:
        return jax.jit(make)
    rows = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    state = jax.eval_shape(
        make, jax.ShapeDtypeStruct(shape, jnp.int32), rows, rows, jax.random.key(0)
    )

    def where(path, leaf):
        split = spec(letters_of(path[-1].name), leaf.shape, ACTIVATIONS, mesh.shape)
        return NamedSharding(mesh, split)

    return jax.jit(make, out_shardings=jax.tree_util.tree_map_with_path(where, state))


# The scheme is no part of what JAX tells traces apart by, so they are told apart by it here.
_program = functools.partial(jax.jit, static_argnames=("mesh", "scheme"))
_step = functools.partial(_program, donate_argnames="state")


@_step
def _prefill(model, state, begin, *, mesh, scheme):
    with scope(mesh, scheme):
        return prefill(model, state, begin)


def _run_steps(model, state, sampling, stop_N, steps, *, mesh, scheme):
    with scope(mesh, scheme):
        state = advance(model, state, sampling, stop_N, steps)
    # Copies, so that the state can be donated before they are fetched.
    return state, tuple(map(jnp.copy, (state.tokens_BS, state.length_B, state.done_B)))


_advance = _step(_run_steps)
_advance_in_one_graph = _step(_run_steps, compiler_options=ONE_GRAPH)


@_program
def _as_read(model, *, mesh, scheme):
    with scope(mesh, scheme):
        return as_read(model)


def capacity_of(num_tokens: int) -> int:
    """The power of two that holds so many tokens."""
    return max(SMALLEST_CAPACITY, 1 << (num_tokens - 1).bit_length())


# What users call.


def generate(
    model: Model,
    prompt_BT: jax.typing.ArrayLike,
    *,
    max_new_tokens: int,
    lengths_B: Sequence[int] | np.ndarray | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
    draft: bool = False,
    key: jax.Array | None = None,
    cache_format: str | None = None,
) -> Int[np.ndarray, "B N"]:
    """The continuation of each prompt: int32 [B, max_new_tokens], the new tokens alone.

    Args:
      lengths_B: tokens of each prompt, which begin its row; all of it by default.
      temperature: 0 takes the most likely token; above 0 a `key` is needed.
      stop: tokens after which a text ends; the rest of its row is `pad`.
      draft: have the MTP modules propose tokens and the model verify them: what is generated, or
        how it is distributed, stays the same. (In BF16 one position and two may be rounded unlike,
        and then the likelier of two nearly equal tokens may change.)
      cache_format: "bf16", "fp8" (tiles) or "fp32"; by default that of activations, on a CPU FP32.

    Raises:
      ValueError: a prompt, a length, a token or a rule of drawing that cannot be followed.
    """
    return generate_with_report(
        model, prompt_BT, max_new_tokens=max_new_tokens, lengths_B=lengths_B,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, stop=stop, pad=pad,
        draft=draft, key=key, cache_format=cache_format,
    )[0]  # fmt: skip


def generate_with_report(model: Model, prompt_BT, **options) -> tuple[np.ndarray, Report]:
    """As `generate`, and what it took."""
    text = Text(model, prompt_BT, **options)
    tokens_BS, length_B, _ = text.advance()
    return text.new_tokens(tokens_BS, length_B), text.report


class Stream:
    """As `generate`, but int32 [B] at a time: the next token of each text as it is known.

    To be iterated over once. Ends when all texts have ended; raises, like `generate`, when it is
    made.
    """

    def __init__(self, model: Model, prompt_BT, **options):
        self._text = Text(model, prompt_BT, **options)
        self._tokens = self._all()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._tokens)

    def _all(self) -> Iterator[np.ndarray]:
        text, shown = self._text, 0
        while True:
            tokens_BS, length_B, done_B = text.advance(1)
            new_BN = text.new_tokens(tokens_BS, length_B)
            known_B = length_B - text.lengths_B
            known = int(known_B.max() if done_B.all() else known_B[~done_B].min())
            for n in range(shown, known):
                yield new_BN[:, n]
            shown = max(shown, known)
            if done_B.all():
                return

    @property
    def report(self) -> Report:
        """What the tokens so far took."""
        return self._text.report


class Text:
    """A generation in progress, seen from the host."""

    def __init__(
        self, model, prompt_BT, *, max_new_tokens, lengths_B=None, temperature=0.0, top_k=None,
        top_p=None, min_p=None, stop=(), pad=0, draft=False, key=None, cache_format=None,
    ):  # fmt: skip
        config = model.config
        prompt_BT, self.lengths_B = check_prompt(
            config, prompt_BT, lengths_B, max_new_tokens, stop, pad
        )
        max_new_tokens = int(max_new_tokens)
        if temperature > 0.0 and key is None:
            raise ValueError(f"{temperature=} draws at random: pass key=jax.random.key(seed)")
        if key is not None and not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
            raise ValueError(f"{key=} must be made by jax.random.key(seed)")
        if draft and not config.num_mtp:
            raise ValueError("draft=True needs a model with MTP modules: this one has num_mtp=0")
        if cache_format is not None:
            check_format(cache_format)
        self._sampling = Sampling.of(temperature, top_k, top_p, min_p)
        mesh = mesh_of(model)
        # Inside a scope the mesh is given.
        given = None if current_mesh() is not None else mesh
        self._where = {"mesh": given, "scheme": current_scheme()}
        if not under_mesh(is_as_read, mesh)(model.precision):
            model = _as_read(model, **self._where)
        self.model = model  # as the products read it
        format = model.precision.activations if cache_format is None else cache_format
        # No token is -1: so few programs serve any number of stop tokens.
        self.stop_N = np.full((-(-max(len(stop), 1) // 8) * 8,), -1, np.int32)
        self.stop_N[: len(stop)] = stop
        device = under_mesh(target, mesh)()
        few = mesh is None and prompt_BT.shape[0] <= MOST_SUMMED
        self._advance = _advance_in_one_graph if few and "NVIDIA" in device.kind else _advance
        self._depth = config.num_mtp if draft else 0
        self.max_new_tokens, self.pad = max_new_tokens, pad
        longest = int(self.lengths_B.max())
        capacity = capacity_of(longest + max_new_tokens + self._depth + 1)
        tokens_BS = np.zeros((prompt_BT.shape[0], capacity), np.int32)
        tokens_BS[:, : prompt_BT.shape[1]] = prompt_BT
        begin = _begin(tokens_BS.shape, config, format, draft, model.dtype, mesh)
        self.state = begin(
            tokens_BS, self.lengths_B, self.lengths_B + np.int32(max_new_tokens),
            jax.random.key(0) if key is None else key,
        )  # fmt: skip
        self._cache_bytes = self.state.cache.num_bytes
        if draft:
            self._cache_bytes += self.state.ahead.cache.num_bytes
        # The last token of a prompt is read by the first step.
        for begin in range(0, longest - 1, under_mesh(chunk_width, mesh)(capacity)):
            self.state = _prefill(model, self.state, np.int32(begin), **self._where)

    def advance(self, steps: int = ALL_STEPS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, lengths and which texts are done after up to so many steps."""
        self.state, seen = self._advance(
            self.model, self.state, self._sampling, self.stop_N, np.int32(steps), **self._where
        )
        lost = int(self.state.lost)
        if lost:
            raise ValueError(
                f"dispatch had no room for {lost} choices of experts: decode fewer texts at once"
            )
        return tuple(map(np.asarray, seen))

    def new_tokens(self, tokens_BS: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """int32 [B, max_new_tokens], `pad` where nothing is known or to come."""
        at_BN = self.lengths_B[:, None] + np.arange(self.max_new_tokens)[None, :]
        new_BN = np.take_along_axis(tokens_BS, at_BN, axis=1)
        return np.where(at_BN < length_B[:, None], new_BN, np.int32(self.pad))

    @property
    def report(self) -> Report:
        steps, row_steps, accepted = map(int, np.asarray(self.state.counts_I))
        return Report(
            tokens=int((np.asarray(self.state.length_B) - self.lengths_B).sum()),
            steps=steps,
            row_steps=row_steps,
            accepted=accepted,
            draft_depth=self._depth,
            cache_bytes=self._cache_bytes,
        )


def mesh_of(model: Model) -> jax.sharding.Mesh | None:
    """The mesh that a model's weights lie on; None for one device."""
    sharding = getattr(model.embed_VD[...], "sharding", None)
    on_mesh = isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1
    return sharding.mesh if on_mesh else None


def check_prompt(
    config: ModelConfig, prompt_BT, lengths_B, max_new_tokens: int, stop: Sequence[int], pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with 0 after their ends, and their lengths; a ValueError where there is an error."""
    prompt_BT = np.asarray(prompt_BT)
    if prompt_BT.ndim != 2 or 0 in prompt_BT.shape:
        raise ValueError(f"prompt of shape {prompt_BT.shape} must be [B, T] with B, T >= 1")
    if not np.issubdtype(prompt_BT.dtype, np.integer):
        raise ValueError(f"prompt of dtype {prompt_BT.dtype} must hold whole numbers")
    B, T = prompt_BT.shape
    whole = [max_new_tokens, pad, *(stop if np.iterable(stop) else [stop])]
    if not all(isinstance(n, int | np.integer) and abs(int(n)) < 2**31 for n in whole):
        raise ValueError(f"{max_new_tokens=}, {pad=} and {stop=} must be whole numbers of 32 bits")
    if not np.iterable(stop):
        raise ValueError(f"{stop=} must be a list of tokens: [{stop}]")
    lengths_B = np.full((B,), T) if lengths_B is None else np.asarray(lengths_B)
    whole = np.issubdtype(lengths_B.dtype, np.integer) and lengths_B.shape == (B,)
    if not whole or not ((lengths_B >= 1) & (lengths_B <= T)).all():
        raise ValueError(f"lengths_B={lengths_B.tolist()} must be {B} whole numbers from 1 to {T}")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    longest = int(lengths_B.max())
    if longest + max_new_tokens > config.max_length:
        raise ValueError(
            f"prompt of {longest} tokens + {max_new_tokens=} exceeds "
            f"max_length={config.max_length}"
        )
    prompt_BT = np.where(np.arange(T)[None, :] < lengths_B[:, None], prompt_BT, 0)
    for what, tokens in (("prompt", prompt_BT), ("stop", np.asarray(stop, np.int64))):
        outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
        if outside.size:
            raise ValueError(f"{what} token {outside[0]} is outside 0..{config.vocab_size - 1}")
    return prompt_BT[:, :longest].astype(np.int32), lengths_B.astype(np.int32)
