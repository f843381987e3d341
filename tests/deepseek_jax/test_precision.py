"""What runs in FP32 when activations are BF16, seen in the jaxpr, and how far BF16 is from FP32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import training
from deepseek_jax.attention import look_in_products
from deepseek_jax.layers import rms_norm
from sharding import make_mesh, placement
from tests.configs import ONE_MTP, TINY, compiled, equations, make_batch, make_run
from tests.oracle import weights

FP32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
RUN = make_run(ONE_MTP, precision=ds.Precision.of("bf16"))
E, V = TINY.num_experts, TINY.vocab_size


def make_loss(run):
    """The total loss and its parts as a function of parameters, biases and tokens."""

    def loss(params, biases, tokens_BS):
        model = training.join(run, params, biases)
        return training.loss_and_aux(
            model, tokens_BS, mtp_weight=0.7, sequence_loss_weight=0.3, remat=run.remat
        )

    return loss


@pytest.fixture(scope="module", params=["forward", "gradient"])
def program(request):
    """All equations of the BF16 loss, and of its gradient."""
    state = training.abstract_state(RUN)
    fn = make_loss(RUN)
    if request.param == "gradient":
        fn = jax.grad(fn, has_aux=True)
    tokens_BS = make_batch(RUN)["tokens"][0]
    return list(equations(jax.make_jaxpr(fn)(state.params, state.biases, tokens_BS)))


def test_fp32_is_multiplied_as_fp32_everywhere():
    # Or a GPU would multiply in TF32. On a mesh the experts' products are grouped ones.
    run = make_run(ONE_MTP)
    state = training.abstract_state(run)
    tokens_BS = make_batch(run)["tokens"][0]
    with placement.scope(make_mesh(expert=2)):
        gradient = jax.grad(make_loss(run), has_aux=True)
        program = list(equations(jax.make_jaxpr(gradient)(state.params, state.biases, tokens_BS)))
    looked = functools.partial(look_in_products, TINY)
    shape_of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    Y = TINY.cache_dim
    seen_BTS = jax.ShapeDtypeStruct((2, 8, 128), jnp.bool_)
    program += equations(jax.make_jaxpr(looked)(shape_of(2, 8, TINY.num_heads, Y),
                                                shape_of(2, 128, Y), seen_BTS))  # fmt: skip
    products = [e for e in of_type(program, "dot_general") if e.invars[0].aval.dtype == FP32]
    assert len(products) > 30
    highest = jax.lax.Precision.HIGHEST
    for product in products:
        assert product.params["precision"] == (highest, highest), product


def of_type(program, name):
    return [equation for equation in program if equation.primitive.name == name]


def dtypes(equation):
    """Dtypes of the floating-point operands and results."""
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    return {a.dtype for a in avals if jnp.issubdtype(a.dtype, jnp.floating)}


def test_matrices_are_multiplied_in_bf16(program):
    products = of_type(program, "dot_general")
    bf16 = [p for p in products if {v.aval.dtype for v in p.invars} == {BF16}]
    # Of a MoE block alone: 5 of MLA, 3 of the shared experts, 2 of the attention core.
    assert len(bf16) >= 3 * 8


def test_the_router_is_fp32(program):
    router = [p for p in of_type(program, "dot_general")
              if any(v.aval.shape == (E, TINY.model_dim) for v in (*p.invars, *p.outvars))]
    assert len(router) >= 2
    for product in router:
        assert dtypes(product) == {FP32}


def test_nothing_per_expert_is_ever_bf16(program):
    # E is no other dimension's size, so this covers scores, biased scores, and the load.
    arrays = [v.aval for equation in program for v in (*equation.invars, *equation.outvars)
              if v.aval.shape and v.aval.shape[-1] == E]
    floats = {a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)}
    assert len(arrays) > 20 and floats == {FP32}


def test_the_routing_bias_is_added_in_fp32(program):
    added = [equation for equation in of_type(program, "add")
             if {v.aval.shape for v in equation.invars} >= {(RUN.micro_batch, RUN.seq_len, E)}]
    assert added and all(dtypes(equation) == {FP32} for equation in added)


@pytest.mark.parametrize(
    "primitive, least",
    [("rsqrt", 13), ("exp", 3), ("log", 2), ("logistic", 4), ("sqrt", 0), ("div", 1), ("cos", 1)],
)
def test_norms_softmax_and_loss_are_fp32(program, primitive, least):
    # rsqrt: 4 norms a block, in 3 of them, and 1 at the end; exp: softmax of attention.
    found = of_type(program, primitive)
    assert len(found) >= least
    assert all(dtypes(equation) <= {FP32} for equation in found)


def test_squares_of_norms_are_summed_in_fp32(program):
    last = TINY.model_dim, TINY.query_latent_dim, TINY.kv_latent_dim
    squares = [equation for equation in of_type(program, "reduce_sum")
               if equation.invars[0].aval.shape[-1] in last]
    assert len(squares) >= 13
    assert all(dtypes(equation) == {FP32} for equation in squares)


def test_logits_of_the_loss_are_fp32(program):
    logits = [p for p in of_type(program, "dot_general") if p.outvars[0].aval.shape[-1:] == (V,)]
    assert logits and all(p.outvars[0].aval.dtype == FP32 for p in logits)


def test_gradients_of_masters_are_fp32_and_moments_bf16():
    state = training.abstract_state(RUN)
    tokens_BS = make_batch(RUN)["tokens"][0]
    gradient = jax.grad(make_loss(RUN), has_aux=True)
    gradients, _ = jax.eval_shape(gradient, state.params, state.biases, tokens_BS)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, gradients))} == {FP32}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.first, state.second))} == {BF16}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.biases)} == {FP32}


def test_products_for_weight_gradients_leave_in_fp32():
    state = training.abstract_state(RUN)
    tokens_BS = make_batch(RUN)["tokens"][0]
    gradient = jax.grad(make_loss(RUN), has_aux=True)
    traced = jax.make_jaxpr(gradient)(state.params, state.biases, tokens_BS)
    shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(state.params["moe"])
              if len(leaf.shape) > 2}
    made = [equation for equation in equations(traced) for v in equation.outvars
            if v.aval.shape in shapes and equation.primitive.name == "dot_general"]
    assert len(made) >= 8
    assert all(equation.outvars[0].aval.dtype == FP32 for equation in made)


def test_an_fp32_model_multiplies_nothing_below_fp32():
    run = make_run(ONE_MTP)
    state = training.abstract_state(run)
    tokens_BS = make_batch(run)["tokens"][0]
    traced = jax.make_jaxpr(make_loss(run))(state.params, state.biases, tokens_BS)
    found = list(equations(traced))
    assert all(dtypes(equation) <= {FP32} for equation in found)
    # On a GPU the default would be TF32 for products of FP32 weights.
    own = [p for p in of_type(found, "dot_general") if p.params["precision"] is not None]
    assert len(own) >= 3 * 8


# Numbers.


@pytest.fixture(scope="module")
def both():
    """((losses, gradients) in BF16, the same in FP32) of one model.

    Biases far apart decide every choice: a rounding must not send a token to another expert. For
    scale: rounding the weights alone moves the gradient by 1e-2.
    """
    config = dataclasses.replace(ONE_MTP, num_layers=2, num_dense_layers=0)
    shrink = lambda p: (0.7 * p).astype(np.float32) if p.ndim > 2 else p
    params = jax.tree.map(shrink, weights.make_weights(config, seed=0))
    ranks = lambda b: 2 * np.argsort(np.argsort(b, axis=-1), axis=-1).astype(np.float32)
    biases = jax.tree.map(ranks, weights.make_biases(config, seed=0))
    results = []
    for precision in ("bf16", "fp32"):
        run = make_run(config, precision=ds.Precision.of(precision))
        args = params, biases, make_batch(run)["tokens"][0]
        compute = jax.value_and_grad(make_loss(run), has_aux=True)
        (_, parts), gradients = compiled(compute, *args)(*args)
        results.append(jax.device_get((parts, gradients)))
    return results


@pytest.mark.parametrize("part", ["loss", "mtp_loss", "sequence_loss"])
def test_losses_in_bf16_are_near_fp32(both, part, relative_error, limits):
    (bf16, _), (fp32, _) = both
    assert relative_error(bf16[part], fp32[part]) < limits["bf16"].value


def test_gradients_in_bf16_are_near_fp32(both, relative_error, limits):
    (_, bf16), (_, fp32) = both
    flat = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    assert relative_error(flat(bf16), flat(fp32)) < limits["bf16"].gradient


def test_every_gradient_in_bf16_points_where_fp32_does(both, relative_error, limits):
    # A router's gradient is a difference of nearly equal terms: it sets the limit.
    (_, bf16), (_, fp32) = both
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(bf16), jax.tree.leaves(fp32),
                            strict=True):
        assert relative_error(a, b) < 5 * limits["bf16"].gradient, path


def test_a_bias_step_is_kept_beside_a_large_bias():
    # 0.001 beside 1 vanishes in BF16.
    biases = {"moe": {"ffn": {"bias_E": jnp.full((1, 2), 1.0)}}}
    updated = training.update_biases(biases, jnp.array([[1, 3]], jnp.int32), jnp.float32(0.001))
    np.testing.assert_allclose(updated["moe"]["ffn"]["bias_E"], [[1.001, 0.999]], rtol=1e-7)


def test_rms_norm_computes_in_fp32_and_returns_the_dtype_it_got():
    x_D = jnp.full((1, 8), 300.0, BF16)  # squares sum to more than BF16 can count
    y_D = rms_norm(x_D, jnp.ones((8,)), 1e-6)
    assert y_D.dtype == BF16 and (y_D == 1).all()


# Stored in BF16.


def test_stored_weights_in_bf16_leave_routers_and_biases_in_fp32():
    precision = ds.Precision(weights="bf16", activations="bf16", matmul="bf16")
    model = nnx.eval_shape(lambda: ds.Model(TINY, precision=precision, rngs=nnx.Rngs(0)))
    params, biases = training.split(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == (FP32 if path[-1].key == "router_ED" else BF16), path
    assert {leaf.dtype for leaf in jax.tree.leaves(biases)} == {FP32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_fp32_in_every_precision(precision):
    model = nnx.eval_shape(lambda: ds.Model(TINY, precision=precision, rngs=nnx.Rngs(0)))
    tokens_BT = jnp.zeros((2, 12), jnp.int32)
    logits_BTV, aux = jax.eval_shape(lambda m, x: m(x, hidden=True, mtp=True), model, tokens_BT)
    assert logits_BTV.dtype == FP32
    assert {logits.dtype for logits in aux.mtp_logits} == {FP32}
    assert aux.hidden_LBTD.dtype == (BF16 if precision == "bf16" else FP32)
