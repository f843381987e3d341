"""Chunked cross-entropy: value and gradients of the plain one, and no whole array of logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.loss import cross_entropy
from sharding import make_mesh
from sharding.placement import under_mesh
from tests.configs import equations

B, T, D, V = 3, 12, 10, 37


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.RandomState(0)
    hidden_BTD = jnp.asarray(rng.randn(B, T, D), jnp.float32)
    head_VD = jnp.asarray(rng.randn(V, D), jnp.float32)
    targets_BT = jnp.asarray(rng.randint(0, V, (B, T)), jnp.int32)
    weight_BT = jnp.asarray(rng.rand(B, T) * (rng.rand(B, T) < 0.8), jnp.float32)
    return hidden_BTD, head_VD, targets_BT, weight_BT


def plain(hidden_BTD, head_VD, targets_BT, weight_BT):
    """The sum from whole logits."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD)
    log_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(log_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return -jnp.sum(weight_BT * picked_BT)


# 5 does not divide 12: there are 6 then; and never more than T.
@pytest.mark.parametrize("chunks", [1, 2, 4, 5, 12, 99])
def test_chunks_give_the_plain_value_and_gradients(inputs, chunks, relative_error, limits):
    hidden_BTD, head_VD, targets_BT, weight_BT = inputs
    elements = -(-B * T * V // chunks)

    def scaled(fn):
        # A factor behind the loss must reach the gradients.
        return lambda h, w: 3.0 * fn(h, w, targets_BT, weight_BT)

    chunked = lambda *args: cross_entropy(*args, chunk_elements=elements)
    expected = jax.value_and_grad(scaled(plain), argnums=(0, 1))(hidden_BTD, head_VD)
    actual = jax.value_and_grad(scaled(chunked), argnums=(0, 1))(hidden_BTD, head_VD)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < limits["fp32"].value
    assert relative_error(chunked(*inputs), plain(*inputs)) < limits["fp32"].value


def test_a_weight_of_the_loss_scales_both_gradients_alike_in_bf16(inputs):
    hidden_BTD, head_VD, *rest = (x.astype(jnp.bfloat16) if x.ndim > 1 and x.dtype == jnp.float32
                                  and x.shape[-1] == D else x for x in inputs)  # fmt: skip
    loss = lambda factor: lambda h, w: factor * cross_entropy(h, w, *rest)
    whole, part = (jax.grad(loss(f), argnums=(0, 1))(hidden_BTD, head_VD) for f in (1.0, 0.3))
    for a, b in zip(part, whole, strict=True):
        assert a.dtype == jnp.bfloat16
        ratio = np.asarray(a, np.float64).ravel() @ np.asarray(b, np.float64).ravel()
        # BF16 has 0.30078 for 0.3.
        assert abs(ratio / np.square(np.asarray(b, np.float64)).sum() - 0.3) < 3e-4


def shapes_of(fn, *args):
    """Shapes of all floating-point arrays of a program."""
    program = equations(jax.make_jaxpr(fn)(*args))
    avals = [v.aval for equation in program for v in equation.outvars]
    return {a.shape for a in avals if jnp.issubdtype(a.dtype, jnp.floating)}


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_logits_of_all_tokens_never_exist_in_one_array(inputs, gradient):
    def fn(chunks):
        loss = lambda *args: cross_entropy(*args, chunk_elements=B * T * V // chunks)
        return jax.grad(loss, argnums=(0, 1)) if gradient else loss

    whole = {shape for shape in shapes_of(fn(1), *inputs) if np.prod(shape) >= B * T * V}
    assert whole  # with one chunk they do
    for chunks in (2, 4, 12):
        largest = max(np.prod(shape) for shape in shapes_of(fn(chunks), *inputs))
        assert largest <= max(B * T * V // chunks, B * T * D, V * D)
        assert (B, T // chunks, V) in shapes_of(fn(chunks), *inputs)


def test_chunks_of_the_default_size_bound_the_logits_of_v3():
    shape = jax.ShapeDtypeStruct
    args = (
        shape((4, 4096, 16), jnp.bfloat16),
        shape((129280, 16), jnp.float32),
        shape((4, 4096), jnp.int32),
        shape((4, 4096), jnp.float32),
    )
    largest = max(np.prod(s) for s in shapes_of(jax.grad(cross_entropy, argnums=(0, 1)), *args))
    assert largest <= 64 * 2**20


def test_tokens_of_weight_0_count_nothing(inputs):
    hidden_BTD, head_VD, targets_BT, weight_BT = inputs
    weight_BT = weight_BT.at[:, 5:].set(0.0)
    loss = lambda h, targets: cross_entropy(h, head_VD, targets, weight_BT, chunk_elements=V)
    changed = targets_BT.at[:, 5:].set(0)
    np.testing.assert_array_equal(loss(hidden_BTD, targets_BT), loss(hidden_BTD, changed))
    assert not np.any(jax.grad(loss)(hidden_BTD, targets_BT)[:, 5:])


def test_large_logits_do_not_overflow(inputs):
    hidden_BTD, head_VD, targets_BT, weight_BT = inputs
    value, gradient = jax.value_and_grad(cross_entropy)(
        1e4 * hidden_BTD, head_VD, targets_BT, weight_BT
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bf16_hidden_states_give_an_fp32_loss_and_gradients_of_their_own_dtypes(
    inputs, relative_error, limits
):
    hidden_BTD, head_VD, *rest = inputs
    loss = lambda h, w: cross_entropy(h, w, *rest, chunk_elements=B * V * 3)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(
        hidden_BTD.astype(jnp.bfloat16), head_VD
    )
    assert value.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    expected = jax.value_and_grad(loss, argnums=(0, 1))(hidden_BTD, head_VD)
    assert relative_error(value, expected[0]) < limits["bf16"].value
    for a, b in zip(gradients, expected[1], strict=True):
        assert relative_error(a, b) < limits["bf16"].gradient


def test_on_a_mesh_the_sums_of_earlier_chunks_are_not_kept():
    mesh = make_mesh(jax.devices()[:2], fsdp=2)
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (
        ((2, T, D), jnp.float32), ((V + 1, D), jnp.float32), ((2, T), jnp.int32),
        ((2, T), jnp.float32),
    )]  # fmt: skip
    chunked = functools.partial(cross_entropy, chunk_elements=3 * (V + 1))
    gradient = under_mesh(jax.grad(chunked, argnums=(0, 1)), mesh)
    sizes = [v.aval.size for e in equations(jax.make_jaxpr(gradient)(*shapes)) for v in e.outvars]
    # The gradient of the head on each of the two devices.
    assert max(sizes) == 2 * (V + 1) * D
