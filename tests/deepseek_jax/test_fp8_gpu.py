"""On a Hopper GPU: the gradients that the kernels make are those of their references on the CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import training
from tests.configs import WIDE, make_run, make_text
from tests.oracle import weights

pytestmark = pytest.mark.gpu

# Head sizes that cuDNN's attention takes, D and F that grouped BF16 products take, and tokens for
# more than one tile of 128.
CONFIG = dataclasses.replace(
    WIDE, model_dim=320, content_head_dim=128, rotary_head_dim=64, value_head_dim=128,
    max_length=256, num_mtp=0,
)
RUN = make_run(CONFIG, batch=2, seq_len=256, precision=ds.Precision.of("fp8"), remat="paper")
# Far apart, biases impose the experts of every token, in every precision.
FAR = 100.0


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    draw = lambda path, w: (
        np.ones(w.shape, np.float32)
        if "norm_" in path[-1].key
        else rng.normal(0, CONFIG.init_std, w.shape).astype(np.float32)
    )
    params = jax.tree_util.tree_map_with_path(draw, weights.make_weights(CONFIG, 0))
    ranks = lambda b: FAR * np.argsort(np.argsort(b, axis=-1), axis=-1).astype(np.float32)
    return params, jax.tree.map(ranks, weights.make_biases(CONFIG, 0))


def gradients(run, params, biases, *, accumulation, device):
    state = dataclasses.replace(training.abstract_state(run), params=None, biases=None)

    def accumulate(params, biases, batch):
        given = dataclasses.replace(state, params=params, biases=biases)
        return training.accumulate(run, given, batch, jnp.float32(0.0))

    with jax.default_device(device):
        args = jax.device_put((params, biases, make_text(run, accumulation=accumulation)), device)
        return jax.device_get(jax.jit(accumulate)(*args))


def cosines(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = (np.asarray(g, np.float64).ravel() for g in (x, y))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield name, x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


@pytest.mark.parametrize("accumulation", [1, 2], ids=["whole", "added-in-place"])
def test_kernels_make_the_gradients_of_the_references(drawn, accumulation):
    gpu, _ = gradients(RUN, *drawn, accumulation=accumulation, device=jax.devices()[0])
    cpu, _ = gradients(RUN, *drawn, accumulation=accumulation, device=jax.devices("cpu")[0])
    for name, cosine in cosines(gpu, cpu):
        assert cosine >= 0.999, (name, cosine)


def test_fp8_points_where_bf16_does_and_idle_experts_have_no_gradient(drawn):
    bf16_run = dataclasses.replace(RUN, precision=ds.Precision.of("bf16"))
    fp8, parts = gradients(RUN, *drawn, accumulation=1, device=jax.devices()[0])
    bf16, _ = gradients(bf16_run, *drawn, accumulation=1, device=jax.devices()[0])
    for name, cosine in cosines(fp8, bf16):
        assert cosine >= (0.90 if "router" in name else 0.97), (name, cosine)
    idle = parts["expert_counts_LE"][0] == 0
    assert idle.any()
    for tree in (fp8, bf16):
        for name in ("w_gate_EFD", "w_up_EFD", "w_down_EDF"):
            assert (tree["moe"]["ffn"][name][0][idle] == 0).all()
