"""What experts' results travel in: LogFMT on the wire, there and for gradients, nowhere else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import deepseek_jax as ds
from deepseek_jax.config import Precision
from deepseek_jax.experts import results_format
from deepseek_jax.training import make_train_step
from pallas_kernels.logfmt import decode_logfmt, encode_logfmt
from sharding import make_mesh
from sharding.expert_parallel import combine, dispatch, dispatch_choices, plan_path
from sharding.placement import Scheme, under_mesh
from tests.configs import ONE_MTP, equations, make_batch, make_run, make_state, on_device

T, K, D, E = 24, 3, 200, 16


def normal(seed, *shape):
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def layer(name, scheme):
    """Values and gradients of experts that multiply by 1, with results in a format."""

    def loss(x_TD, w_TK, c_TD, expert_TK):
        path = plan_path(expert_TK, E, 1, held=E // 8, results=results_format(name))
        rows_MD = dispatch(x_TD, path) * dispatch_choices(w_TK, path)[:, None]
        y_TD = combine(rows_MD, path)
        return jnp.sum(y_TD * c_TD), y_TD

    def on_mesh(*args):
        (_, y_TD), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*args)
        return y_TD, *gradients

    mesh, each = make_mesh(expert=8), P("expert")
    mapped = jax.shard_map(on_mesh, mesh=mesh, in_specs=(each,) * 4, out_specs=each)
    return jax.jit(under_mesh(mapped, mesh, scheme))


@pytest.fixture(scope="module")
def operands():
    rng = np.random.RandomState(0)
    expert_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    return normal(0, T, D), normal(1, T, K), normal(2, T, D), jnp.asarray(expert_TK)


def summed_in(bits, x_TD, w_TK, expert_TK):
    """Each device's part of a token's sum in the format, then the sum of the parts."""
    parts = np.zeros((8, T, D), np.float32)
    for t in range(T):
        for k in range(K):
            parts[int(expert_TK[t, k]) // 2, t] += np.float32(w_TK[t, k]) * np.asarray(x_TD[t])
    coded = encode_logfmt(jnp.asarray(parts.reshape(8 * T, D)), bits)
    return np.asarray(decode_logfmt(coded, bits, D, dtype=jnp.float32)).reshape(8, T, D).sum(0)


@pytest.mark.parametrize("bits", [8, 10], ids="logfmt{}".format)
def test_results_and_gradients_are_rounded_once_on_their_way(bits, operands, relative_error):
    x_TD, w_TK, c_TD, expert_TK = operands
    y_TD, dx_TD, dw_TK = layer(f"logfmt{bits}", Scheme())(*operands)
    assert relative_error(y_TD, summed_in(bits, x_TD, w_TK, expert_TK)) < 1e-5
    assert relative_error(dx_TD, summed_in(bits, c_TD, w_TK, expert_TK)) < 1e-5
    plain_TD = np.einsum("TK,TD->TD", w_TK, x_TD)
    assert 1e-3 < relative_error(y_TD, plain_TD) < (0.02 if bits == 8 else 0.006)
    # A routing weight's gradient is a number of its own and is not rounded.
    expected = np.broadcast_to(np.sum(x_TD * c_TD, 1)[:, None], (T, K))
    assert relative_error(dw_TK, expected) < 1e-5


def test_two_hops_round_twice(operands, relative_error):
    x_TD, w_TK, _, expert_TK = operands
    once = layer("logfmt8", Scheme())(*operands)[0]
    twice = layer("logfmt8", Scheme(expert_nodes=4))(*operands)[0]
    plain_TD = np.einsum("TK,TD->TD", w_TK, x_TD)
    assert relative_error(once, plain_TD) < relative_error(twice, plain_TD) < 0.03


def test_what_crosses_is_the_format(operands):
    def sent(name):
        """Bytes of a row of all arrays that cross in one direction or the other."""
        jaxpr = layer(name, Scheme()).trace(*operands).jaxpr
        arrays = [e.invars[0].aval for e in equations(jaxpr) if e.primitive.name == "all_to_all"]
        wide = [a for a in arrays if a.ndim == 2 and a.shape[1] > K or a.dtype == jnp.bfloat16]
        return [(a.shape[1] * a.dtype.itemsize, jnp.dtype(a.dtype).name) for a in wide]

    plain, coded = sent("bf16"), sent("logfmt8")
    # Results and gradients of tokens, 200 channels of FP32; the other way whatever it is in words.
    assert sorted(plain) == [(800, "float32")] * 2 + [(800, "uint32")] * 2
    assert coded.count((800, "uint32")) == 2
    # 256 codes, and two extremes of two tiles, for results and for gradients of tokens.
    assert coded.count((256, "uint16")) == 2 and coded.count((4, "bfloat16")) == 4


def test_the_model_hands_its_format_to_every_layer():
    precision = dataclasses.replace(Precision.of("bf16"), combine="logfmt8")
    model = nnx.eval_shape(lambda: ds.Model(ONE_MTP, precision=precision, rngs=nnx.Rngs(0)))
    assert model.moe.ffn.combine == model.mtp.block.ffn.combine == "logfmt8"


@pytest.mark.slow
def test_a_step_in_logfmt_is_close_to_one_in_fp32():
    config = dataclasses.replace(
        ONE_MTP, num_layers=1, num_dense_layers=0, num_experts=8, num_groups=4, groups_per_token=2,
        experts_per_token=3,
    )  # fmt: skip
    run = make_run(config, batch=8)
    state, batch, mesh = make_state(run), make_batch(run), make_mesh(expert=8)
    losses = {}
    for name in ("bf16", "logfmt10", "logfmt8"):
        chosen = dataclasses.replace(run, precision=Precision(combine=name))
        step = make_train_step(chosen, mesh)
        _, metrics = step(on_device(state), batch)
        losses[name] = float(metrics["loss"])
    near, far = (abs(losses[name] / losses["bf16"] - 1) for name in ("logfmt10", "logfmt8"))
    assert 0 < near < 1e-3 and 0 < far < 1e-2


def test_what_no_device_would_use_is_refused():
    run = make_run(ONE_MTP, precision=Precision(combine="logfmt8"))
    for mesh in (None, make_mesh(data=8)):
        with pytest.raises(ValueError, match="needs an expert axis above 1"):
            make_train_step(run, mesh)
    with pytest.raises(ValueError, match="combine='logfmt9' must be one of"):
        Precision(combine="logfmt9")


def test_an_unknown_format_is_not_taken_for_results_as_they_are():
    with pytest.raises(ValueError, match="combine='fp8' must be one of bf16, logfmt8, logfmt10"):
        results_format("fp8")
