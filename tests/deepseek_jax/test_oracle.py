"""Logits, losses and every gradient of the package in FP32 against the float64 reference."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import training
from deepseek_jax.config import Yarn
from tests.oracle import golden, reference, weights

# Large, so that the gradients of both losses are seen beside the main one.
MTP_WEIGHT, SEQUENCE_LOSS_WEIGHT = 0.7, 0.3

# Every size differs from every other.
V3 = ds.ModelConfig(
    vocab_size=53,
    model_dim=22,
    num_layers=3,
    num_dense_layers=1,
    num_heads=5,
    content_head_dim=10,
    rotary_head_dim=12,
    value_head_dim=7,
    query_latent_dim=14,
    kv_latent_dim=9,
    dense_ffn_dim=26,
    expert_ffn_dim=11,
    num_experts=16,
    num_shared_experts=1,
    experts_per_token=6,
    num_groups=4,
    groups_per_token=2,
    route_scale=2.5,
    num_mtp=1,
    max_length=128,
)
STRETCHED = Yarn(
    factor=8.0, original_length=16, beta_fast=4, beta_slow=0.5, mscale=0.9, mscale_all_dim=0.7
)
V2 = dataclasses.replace(
    V3,
    score="softmax",
    normalize_weights=False,
    route_scale=4.0,
    num_shared_experts=2,
    num_mtp=0,
)


def case(name, config, *, bias=0.15, shape=(2, 33), segments=False, remat="none", slow=False):
    """Tokens [B, T + 1] of `shape` under `config`, routing biases of standard deviation `bias`."""
    value = SimpleNamespace(config=config, bias=bias, shape=shape, segments=segments, remat=remat)
    return pytest.param(value, id=name, marks=[pytest.mark.slow] if slow else [])


CASES = [
    case("tiny", ds.configs.tiny(), bias=0.05, shape=(2, 65)),
    case(
        "v3-yarn-beyond-original-length", dataclasses.replace(V3, yarn=STRETCHED, rope_theta=90.0)
    ),
    case(
        "v3-no-query-latent-no-shared-mtp2-segments",
        dataclasses.replace(V3, query_latent_dim=None, num_shared_experts=0, num_mtp=2),
        segments=True,
    ),
    case("v2-group-limited-greedy-shared2", V2),
    case(
        "v2-greedy-no-query-latent",
        dataclasses.replace(V2, query_latent_dim=None, num_groups=1, groups_per_token=1),
        slow=True,
    ),
    case(
        "v2-normalized-yarn",
        dataclasses.replace(V2, normalize_weights=True, yarn=STRETCHED, num_mtp=1),
        slow=True,
    ),
    case(
        "v3-one-group-no-mtp",
        dataclasses.replace(V3, num_groups=1, groups_per_token=1, num_mtp=0),
        slow=True,
    ),
    case(
        "v3-shared2-two-dense",
        dataclasses.replace(V3, num_shared_experts=2, num_layers=4, num_dense_layers=2),
        slow=True,
    ),
    case(
        "v3-weights-not-normalized-mtp2",
        dataclasses.replace(V3, normalize_weights=False, num_mtp=2),
        slow=True,
    ),
    case("v3-remat-full-segments", V3, segments=True, remat="full", slow=True),
]


def make_segments(shape):
    """Ids that never repeat within a row, in runs of uneven length."""
    rng = np.random.RandomState(0)
    return np.cumsum(rng.rand(*shape) < 0.2, axis=1).astype(np.int32)


def run_of(config):
    """A run around `config`, for the package's functions that take one."""
    return ds.Run(
        config=config,
        steps=1,
        seq_len=config.max_length,
        micro_batch=1,
        batch_size=ds.Schedule.constant(1),
        learning_rate=ds.Schedule.constant(1e-3),
    )


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """What the reference expects, and what the package gives, for one case."""
    case = request.param
    config = case.config
    segments = make_segments(case.shape) if case.segments else None
    expect = reference.make_loss_and_gradients(
        config, mtp_weight=MTP_WEIGHT, sequence_loss_weight=SEQUENCE_LOSS_WEIGHT
    )
    found = weights.search(config, expect, case.shape, segments=segments, bias={"scale": case.bias})
    run = run_of(config)

    @functools.partial(jax.jit, compiler_options=reference.QUICK)
    def compute(params, biases, tokens_BS, segments_BS):
        def total(params):
            return training.loss_and_aux(
                training.join(run, params, biases),
                tokens_BS,
                segments_BS,
                mtp_weight=MTP_WEIGHT,
                sequence_loss_weight=SEQUENCE_LOSS_WEIGHT,
                remat=case.remat,
            )

        (total_loss, losses), gradients = jax.value_and_grad(total, has_aux=True)(params)
        segments_BT = None if segments_BS is None else segments_BS[:, :-1]
        model = training.join(run, params, biases)
        logits_BTV, aux = model(tokens_BS[:, :-1], segments_BT=segments_BT, hidden=True, mtp=True)
        return SimpleNamespace(
            logits_BTV=logits_BTV,
            aux=aux,
            total_loss=total_loss,
            losses=losses,
            gradients=gradients,
        ).__dict__

    actual = compute(to_jax(found.weights), to_jax(found.biases), found.tokens, segments)
    return SimpleNamespace(
        config=config, found=found, expected=found.expected, actual=SimpleNamespace(**actual)
    )


def test_choices_are_clear_every_expert_is_used_and_biases_have_both_signs(both):
    assert both.expected.margin > 1e-4
    assert (both.expected.expert_counts_LE > 0).all()
    biases = jax.tree.leaves(both.found.biases)
    assert bool(biases) == (both.config.score == "sigmoid")
    for bias_LE in biases:
        assert (bias_LE.min(axis=1) < 0).all() and (bias_LE.max(axis=1) > 0).all()


def test_logits_and_hidden_states(both, relative_error, limits):
    limit = limits["fp32"].value
    assert relative_error(both.actual.logits_BTV, both.expected.logits_BTV) < limit
    hidden_LBTD = both.actual.aux.hidden_LBTD
    assert len(hidden_LBTD) == both.config.num_layers + 1
    for layer, state_BTD in enumerate(both.expected.hidden_LBTD):
        assert relative_error(hidden_LBTD[layer], state_BTD) < limit, f"{layer=}"


def test_mtp_logits(both, relative_error, limits):
    actual, expected = both.actual.aux.mtp_logits or (), both.expected.mtp_logits
    assert len(actual) == len(expected) == both.config.num_mtp
    for logits_BtV, expected_BtV in zip(actual, expected, strict=True):
        assert relative_error(logits_BtV, expected_BtV) < limits["fp32"].value


def test_expert_counts_and_sequence_loss(both, relative_error, limits):
    for source in (both.actual.aux.expert_counts_LE, both.actual.losses["expert_counts_LE"]):
        np.testing.assert_array_equal(np.asarray(source), both.expected.expert_counts_LE)
    for source in (both.actual.aux.sequence_loss, both.actual.losses["sequence_loss"]):
        assert relative_error(source, both.expected.sequence_loss) < limits["fp32"].value


def test_losses(both, relative_error, limits):
    limit = limits["fp32"].value
    assert relative_error(both.actual.losses["loss"], both.expected.loss) < limit
    assert relative_error(both.actual.losses["mtp_loss"], both.expected.mtp_loss) < limit
    assert relative_error(both.actual.total_loss, both.expected.total_loss) < limit


def test_every_gradient(both, relative_error, limits):
    actual, expected = both.actual.gradients, both.expected.gradients
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    errors = {}
    for path, expected_array in jax.tree.leaves_with_path(expected):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        array = np.asarray(get(actual, path))
        assert (array[expected_array == 0] == 0).all(), f"{name} is not 0 where it must be"
        # The layers of a stack are tensors of their own.
        stacked = path[0].key in ("dense", "moe", "mtp")
        layers = range(len(array)) if stacked else [...]
        for layer in layers:
            error = relative_error(array[layer], expected_array[layer])
            errors[f"{name}[{layer}]" if stacked else name] = error
    worst = {name: error for name, error in errors.items() if error >= limits["fp32"].gradient}
    assert not worst, worst


def get(tree, path):
    """The leaf at a path of dict keys."""
    for key in path:
        tree = tree[key.key]
    return tree


def test_golden_file_in_fp32(relative_error, limits):
    config = ds.ModelConfig(**golden.SIZES, yarn=Yarn(**golden.YARN))
    params = weights.make_weights(config, golden.SEED)
    biases = weights.make_biases(config, golden.SEED, **golden.BIAS)
    tokens_BT = jnp.asarray(weights.make_tokens(golden.SEED, config.vocab_size, golden.SHAPE))
    stored = golden.load_golden()
    run = run_of(config)

    @functools.partial(jax.jit, compiler_options=reference.QUICK)
    def compute(params, biases):
        return training.join(run, params, biases)(tokens_BT, hidden=True, mtp=True)

    logits_BTV, aux = compute(to_jax(params), to_jax(biases))
    limit = limits["fp32"].value
    assert relative_error(logits_BTV, stored["logits_BTV"]) < limit
    for layer, state_BTD in enumerate(stored["hidden_LBTD"]):
        assert relative_error(aux.hidden_LBTD[layer], state_BTD) < limit, f"{layer=}"
    for k, logits_BtV in enumerate(aux.mtp_logits, start=1):
        assert relative_error(logits_BtV, stored[f"mtp_logits_{k}"]) < limit, f"depth {k}"
