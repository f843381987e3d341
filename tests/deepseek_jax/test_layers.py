"""The product of the model, norms, embedding and gated feed-forward against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import layers
from deepseek_jax.layers import FeedForward, embed, rms_norm
from deepseek_jax.linear import linear
from deepseek_jax.swiglu import swiglu
from sharding.mesh import make_mesh
from sharding.placement import under_mesh
from tests.configs import TINY


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), dtype)


@pytest.mark.parametrize(
    "signature, x, w",
    [
        ("BTD,FD->BTF", (2, 3, 5), (7, 5)),
        ("BTQ,NAQ->BTNA", (2, 3, 5), (4, 6, 5)),
        ("BTNU,DNU->BTD", (2, 3, 4, 6), (5, 4, 6)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_product_and_its_gradients_are_those_of_einsum(signature, x, w, relative_error, limits):
    x, w = normal(0, *x), normal(1, *w)
    plain = lambda x, w: jnp.sum(jnp.sin(jnp.einsum(signature, x, w)))
    ours = lambda x, w: jnp.sum(jnp.sin(linear(signature, x, w)))
    expected = jax.value_and_grad(plain, argnums=(0, 1))(x, w)
    actual = jax.value_and_grad(ours, argnums=(0, 1))(x, w)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < limits["fp32"].value


def test_a_bf16_product_of_an_fp32_master_has_an_fp32_gradient(relative_error, limits):
    # 2^8 equal terms and one that BF16 sums would lose.
    x_BTD = jnp.ones((1, 257, 1), jnp.bfloat16)
    w_FD = jnp.ones((1, 1), jnp.float32)
    y_BTF, pull = jax.vjp(lambda x, w: linear("BTD,FD->BTF", x, w), x_BTD, w_FD)
    dx_BTD, dw_FD = pull(jnp.ones_like(y_BTF))
    assert (y_BTF.dtype, dx_BTD.dtype, dw_FD.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert float(dw_FD[0, 0]) == 257.0


def test_rms_norm_by_hand():
    x_D, weight_D = jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0])
    expected = np.array([[3.0, 8.0]]) / np.sqrt(12.5 + 0.5)
    np.testing.assert_allclose(rms_norm(x_D, weight_D, 0.5), expected, rtol=1e-6)


def test_swiglu_by_hand():
    gate, up = jnp.array([1.0, -2.0]), jnp.array([3.0, 5.0])
    expected = np.array([3.0 / (1 + np.exp(-1.0)), -10.0 / (1 + np.exp(2.0))])
    np.testing.assert_allclose(swiglu(gate, up), expected, rtol=1e-6)
    assert swiglu(gate.astype(jnp.bfloat16), up.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_feed_forward_is_its_formula(relative_error, limits):
    ffn = FeedForward(TINY, 24, rngs=nnx.Rngs(0))
    ffn = jax.tree.map(lambda w: 50 * w, ffn)
    x_BTD = normal(0, 2, 3, TINY.model_dim)
    gate, up, down = ffn.w_gate_FD[...], ffn.w_up_FD[...], ffn.w_down_DF[...]
    expected = (jax.nn.silu(x_BTD @ gate.T) * (x_BTD @ up.T)) @ down.T
    assert relative_error(ffn(x_BTD), expected) < limits["fp32"].value


def test_gradients_of_an_embedding_row_add_up_in_fp32():
    tokens_BT = jnp.full((1, 300), 2, jnp.int32)
    table_VD = jnp.ones((4, 1), jnp.float32)

    def total(table_VD):
        return jnp.sum(embed(tokens_BT, table_VD, jnp.bfloat16).astype(jnp.float32))

    assert embed(tokens_BT, table_VD, jnp.bfloat16).dtype == jnp.bfloat16
    # BF16 cannot count beyond 256.
    assert jax.grad(total)(table_VD)[:, 0].tolist() == [0.0, 0.0, 300.0, 0.0]


def test_a_matrix_is_drawn_in_its_shards_and_is_the_same_without_a_mesh():
    draw = lambda: layers.normal(nnx.Rngs(0), (24, 6, 40), TINY)[...]
    mesh = make_mesh(fsdp=4, expert=2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert", None, "fsdp"))
    program = jax.jit(under_mesh(draw, mesh), out_shardings=where).lower().compile()
    np.testing.assert_allclose(program(), draw(), rtol=1e-6)
    text = program.as_text()
    assert "f32[12,6,10]" in text and "[24,6,40]" not in text and "[5760]" not in text
