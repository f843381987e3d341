"""AdamW: optax's with FP32 moments, the clip, decay of matrices alone, moments kept in BF16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import training
from deepseek_jax.config import AdamW
from deepseek_jax.optimizer import adamw, is_decayed
from tests.configs import TINY, make_run

SHAPES = {"final_norm_D": (5,), "ffn": {"w_gate_FD": (3, 5)}, "moe": {"q_norm_Q": (2, 4)}}


def draw(seed, scale=1.0):
    """A tree of SHAPES."""
    rng = np.random.RandomState(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.randn(*shape), jnp.float32), SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def zeros(dtype=jnp.float32):
    return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), draw(0))


def update(params, gradients, first, second, *, count=0, learning_rate=1e-2, settings=None):
    return adamw(
        params,
        gradients,
        first,
        second,
        count=jnp.int32(count),
        learning_rate=jnp.float32(learning_rate),
        norm=norm_of(gradients),
        settings=settings or AdamW(clip_norm=1e9),
    )


@pytest.mark.parametrize("clip_norm", [1e9, 0.5], ids=["no-clip", "clip"])
def test_steps_with_fp32_moments_are_those_of_optax(clip_norm, relative_error):
    settings = AdamW(clip_norm=clip_norm)
    params, first, second = draw(0), zeros(), zeros()
    mask = {"final_norm_D": False, "ffn": {"w_gate_FD": True}, "moe": {"q_norm_Q": False}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask),
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, state = params, optimizer.init(params)
        for seed in range(1, 6):
            updates, state = optimizer.update(draw(seed), state, expected)
            expected = optax.apply_updates(expected, updates)
    for count in range(5):
        params, first, second = update(
            params, draw(count + 1), first, second, count=count, settings=settings
        )
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-6


def test_the_clip_scales_long_gradients_to_its_norm_and_leaves_short_ones():
    settings = AdamW(clip_norm=1.0, beta1=0.0)
    long, short = draw(1, scale=10.0), draw(1, scale=0.01)
    _, first, _ = update(draw(0), long, zeros(), zeros(), settings=settings)
    assert float(norm_of(first)) == pytest.approx(1.0, rel=1e-5)
    _, first, _ = update(draw(0), short, zeros(), zeros(), settings=settings)
    jax.tree.map(np.testing.assert_array_equal, first, short)


def test_decay_shrinks_matrices_alone():
    still = zeros()
    params, *_ = update(draw(0), still, zeros(), zeros(), learning_rate=0.5,
                        settings=AdamW(weight_decay=0.1))
    before = draw(0)
    np.testing.assert_allclose(
        params["ffn"]["w_gate_FD"], before["ffn"]["w_gate_FD"] * 0.95, rtol=1e-6
    )
    np.testing.assert_array_equal(params["final_norm_D"], before["final_norm_D"])
    np.testing.assert_array_equal(params["moe"]["q_norm_Q"], before["moe"]["q_norm_Q"])


def test_every_matrix_of_the_model_is_decayed_and_no_norm():
    params = training.abstract_state(make_run(TINY)).params
    decayed = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)
               if is_decayed(path)}
    rest = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)} - decayed
    assert rest == {"attention_norm_D", "ffn_norm_D", "q_norm_Q", "kv_norm_C", "embed_norm_D",
                    "hidden_norm_D", "final_norm_D"}
    assert {"embed_VD", "head_VD", "router_ED", "w_join_DZ", "w_gate_EFD"} <= decayed


def test_moments_keep_the_dtype_they_came_in_and_masters_are_fp32():
    params, first, second = update(draw(0), draw(1), zeros(jnp.bfloat16), zeros(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves((first, second))} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_a_step_with_bf16_moments_rounds_them_after_their_use(relative_error):
    exact = update(draw(0), draw(1), zeros(), zeros())
    rounded = update(draw(0), draw(1), zeros(jnp.bfloat16), zeros(jnp.bfloat16))
    # Parameters moved by the unrounded moments; the stored ones are rounded.
    jax.tree.map(np.testing.assert_array_equal, rounded[0], exact[0])
    for i in (1, 2):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
                     rounded[i], exact[i])


def test_the_first_step_is_unbiased():
    # Without weight decay Adam's first step has length learning_rate in every element.
    params, *_ = update(draw(0), draw(1), zeros(), zeros(), settings=AdamW(weight_decay=0.0,
                                                                          clip_norm=1e9))
    moved = jax.tree.map(lambda a, b, g: (b - a) * jnp.sign(g), params, draw(0), draw(1))
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 1e-2, rtol=1e-3)


def test_precision_decides_the_dtype_of_moments():
    run = make_run(TINY)
    fp32 = training.abstract_state(run)
    bf16 = training.abstract_state(
        dataclasses.replace(run, precision=dataclasses.replace(run.precision, moments="bf16"))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((fp32.first, fp32.second))} == {
        jnp.dtype("float32")
    }
    assert {leaf.dtype for leaf in jax.tree.leaves((bf16.first, bf16.second))} == {
        jnp.dtype("bfloat16")
    }
