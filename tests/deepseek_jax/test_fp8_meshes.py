"""An FP8 train step on meshes of eight devices: the numbers of one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import deepseek_jax as ds
from deepseek_jax import fp8, training
from sharding import make_mesh
from sharding.placement import under_mesh
from sharding.rules import STORE, weight_spec
from tests.configs import WIDE, compiled, make_batch, make_run, make_state, on_device

# Heads and hidden channels of two devices of a tensor axis are whole blocks of 128.
CONFIG = dataclasses.replace(
    WIDE, num_mtp=0, content_head_dim=128, rotary_head_dim=128, value_head_dim=128,
    dense_ffn_dim=512, expert_ffn_dim=256,
)
RUN = make_run(CONFIG, batch=8, precision=ds.Precision.of("fp8"), remat="paper")
# With the least cosine. Tokens of one device share scales in its weight gradients; over a tensor
# axis sums of two BF16 results also round before the next product does.
MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "expert": 2}, 0.998, id="data2-fsdp2-expert2"),
    pytest.param({"fsdp": 4, "tensor": 2}, 0.985, id="fsdp4-tensor2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def state():
    """Without first moments, so that those after a step are the clipped gradient, times 0.1."""
    state = make_state(RUN)
    far = lambda b: 100 * np.argsort(np.argsort(b, axis=-1), axis=-1).astype(np.float32)
    return dataclasses.replace(
        state,
        first=jax.tree.map(np.zeros_like, state.first),
        biases=jax.tree.map(far, state.biases),
    )


def step(state, mesh=None):
    placed, batch = on_device(state), make_batch(RUN)
    if mesh is not None:
        placed = jax.device_put(placed, training.state_shardings(RUN, mesh))
    after, metrics = compiled(ds.make_train_step(RUN, mesh), placed, batch)(placed, batch)
    return jax.device_get((after, metrics))


@pytest.fixture(scope="module")
def one_device(state):
    return step(state)


@pytest.mark.parametrize("sizes, least", MESHES)
def test_a_step_on_a_mesh_is_that_of_one_device(sizes, least, state, one_device):
    after, metrics = step(state, make_mesh(**sizes))
    expected, metrics_of_one = one_device
    np.testing.assert_allclose(metrics["loss"], metrics_of_one["loss"], rtol=2e-3)
    assert (metrics["expert_counts_LE"] == metrics_of_one["expert_counts_LE"]).all()
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(after.first), jax.tree.leaves(expected.first),
        strict=True,
    ):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        norms, where = (np.linalg.norm(a), np.linalg.norm(b)), jax.tree_util.keystr(path)
        np.testing.assert_allclose(*norms, rtol=0.03, err_msg=where)
        assert a @ b >= least * norms[0] * norms[1] > 0, (where, norms)


@pytest.mark.parametrize(
    "name, shape, sizes, falls",
    [
        ("w_gate_EFD", (2, 8, 256, 512), {"fsdp": 4, "data": 2}, True),
        ("wo_DNU", (2, 512, 4, 64), {"fsdp": 2, "data": 4}, True),
        # 512 / 8 = 64, as 7168 / 32 = 224.
        ("w_gate_EFD", (2, 8, 256, 512), {"fsdp": 8}, False),
        ("wkv_a_YD", (2, 160, 512), {"fsdp": 2, "expert": 4}, False),
    ],
    ids=["on-blocks", "heads-on-blocks", "inside-blocks", "inside-blocks-of-both"],
)
def test_stored_pieces_are_quantised_to_the_bits_of_one_device(name, shape, sizes, falls):
    letters, mesh = name.rsplit("_", 1)[-1], make_mesh(**sizes)
    assert fp8.falls_on_blocks(letters, shape[1:], mesh.shape) == falls
    master = jnp.asarray(np.random.RandomState(0).randn(*shape), jnp.float32)
    quantise = lambda w: fp8.quantize_weight(w, letters, axes=1).blocks
    expected = compiled(quantise, master)(master)
    where = NamedSharding(mesh, weight_spec(name, shape, STORE, mesh.shape))
    placed = jax.device_put(master, where)
    program = compiled(under_mesh(quantise, mesh), placed)
    actual = program(placed)
    k, n = (-(-size // 128) for size in (expected.codes.shape[-1], expected.codes.shape[-2]))
    for part in ("codes", "transposed"):
        a, b = (np.asarray(getattr(blocks, part)).view(np.uint8) for blocks in (actual, expected))
        np.testing.assert_array_equal(a, b)
        # They stay in as many pieces as the master.
        assert getattr(actual, part).addressable_shards[0].data.size < a.size
    np.testing.assert_array_equal(actual.scale[..., :k], expected.scale[..., :k])
    np.testing.assert_array_equal(
        actual.transposed_scale[..., :n], expected.transposed_scale[..., :n]
    )
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", program.as_text())
    layer = np.prod(shape[1:])
    largest = max(np.prod([int(n) for n in dims.split(",")]) for dims in gathered)
    # Scales alone; or one layer at a time.
    assert largest <= (layer / 128 if falls else layer)
