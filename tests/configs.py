"""The tiny configuration of the tests, runs, states and batches around it, and a jaxpr walker."""

import dataclasses

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax import training
from tests.oracle import weights
from tests.oracle.reference import QUICK

# All dimensions differ, derived ones included (A = 32, X = 19, Y = 42, Z = 80, pairs of R = 11,
# shared F = 48), and layer counts too: a swapped letter cannot pass. Eight devices divide
# D, N, V and every F.
TINY = ds.ModelConfig(
    vocab_size=104,
    model_dim=40,
    num_layers=4,
    num_dense_layers=1,
    num_heads=8,
    content_head_dim=10,
    rotary_head_dim=22,
    value_head_dim=9,
    query_latent_dim=36,
    kv_latent_dim=20,
    dense_ffn_dim=88,
    expert_ffn_dim=24,
    num_experts=28,
    num_shared_experts=2,
    experts_per_token=6,
    num_groups=7,
    groups_per_token=5,
    route_scale=2.5,
    num_mtp=2,
    max_length=64,
)
# One MTP module less to compile.
ONE_MTP = dataclasses.replace(TINY, num_mtp=1)
# For FP8: D, Q and every F are above 256 and no multiple of 128, so blocks and tiles are cut short.
WIDE = dataclasses.replace(
    TINY,
    model_dim=272,
    num_layers=2,
    num_heads=2,
    content_head_dim=16,
    rotary_head_dim=8,
    value_head_dim=48,
    query_latent_dim=288,
    kv_latent_dim=32,
    dense_ffn_dim=304,
    expert_ffn_dim=320,
    num_experts=6,
    num_shared_experts=1,
    experts_per_token=2,
    num_groups=3,
    groups_per_token=2,
    num_mtp=1,
)


def make_run(config=TINY, *, batch=4, **changes):
    """A run of `batch` sequences of 12 tokens a step, in one micro-batch."""
    fields = dict(
        config=config,
        steps=3,
        seq_len=12,
        micro_batch=batch,
        batch_size=ds.Schedule.constant(batch),
        learning_rate=ds.Schedule.constant(1e-3),
        mtp_weight=ds.Schedule.constant(0.7),
        sequence_loss_weight=0.3,
    )
    return ds.Run(**{**fields, **changes})


def make_state(run, seed=0):
    """A state in numpy whose parameters have fan-in scale and whose moments are not 0."""
    params = weights.make_weights(run.config, seed)
    state = training.abstract_state(run)
    moment = lambda sign: lambda like, p: np.asarray(1e-3 * (p**2 if sign else p), like.dtype)
    return dataclasses.replace(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state),
        params=params,
        biases=weights.make_biases(run.config, seed, scale=0.05),
        first=jax.tree.map(moment(0), state.first, params),
        second=jax.tree.map(moment(1), state.second, params),
        ema=jax.tree.map(lambda p: p.copy(), params) if run.ema_decay is not None else None,
    )


def make_batch(run, *, accumulation=1, seed=0):
    """Random tokens [accumulation, B, T + 1] in numpy."""
    shape = (accumulation, run.micro_batch, run.seq_len + 1)
    return {"tokens": weights.make_tokens(seed, run.config.vocab_size, shape)}


def make_text(run, *, accumulation=1, seed=0):
    """Tokens as make_batch makes them, nine tenths of which follow from the one before.

    Their gradients add up as those of text do, and roundings of single tokens do not.
    """
    rng, shape = np.random.default_rng(seed), (accumulation, run.micro_batch)
    tokens = [rng.integers(0, 16, shape)]
    for _ in range(run.seq_len):
        follows = rng.random(shape) < 0.9
        tokens.append(np.where(follows, (5 * tokens[-1] + 1) % 16, rng.integers(0, 16, shape)))
    return {"tokens": np.stack(tokens, axis=-1).astype(np.int32)}


def on_device(tree):
    """Copies of numpy arrays that a program may take for its own."""
    return jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), tree)


def compiled(fn, *args, options=QUICK):
    """The program of a function, jitted or not, for arguments like these."""
    fn = fn if hasattr(fn, "lower") else jax.jit(fn)
    return fn.lower(*args).compile(options)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
