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
from tests.oracle.reference import ROW_BY_ROW

# Heads and hidden channels of two devices of a tensor axis are whole blocks of 128.
CONFIG = dataclasses.replace(
    WIDE, num_mtp=0, content_head_dim=128, rotary_head_dim=128, value_head_dim=128,
    dense_ffn_dim=512, expert_ffn_dim=256, num_experts=8, num_groups=4, max_length=128,
)
# Each device has a sequence of 128 tokens, of which its experts get all or none: so the same tokens
# share scales in weight gradients, 128 at a time, on one device and on eight.
# Nothing is computed again: XLA may fuse that with what reads it, by the number of rows.
RUN = make_run(CONFIG, batch=8, seq_len=128, precision=ds.Precision.of("fp8"), remat="none")
MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "expert": 2}, id="data2-fsdp2-expert2"),
    pytest.param({"expert": 8}, id="expert8", marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "expert": 4}, id="fsdp2-expert4", marks=pytest.mark.slow),
    pytest.param({"data": 4, "fsdp": 2}, id="data4-fsdp2", marks=pytest.mark.slow),
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


def step(state, mesh=None, accumulation=1):
    """The state and metrics after a step on one batch, or on the same several times."""
    placed, batch = on_device(state), make_batch(RUN)
    batch["tokens"] = np.repeat(batch["tokens"], accumulation, axis=0)
    if mesh is not None:
        placed = jax.device_put(placed, training.state_shardings(RUN, mesh))
    # One code that falls the other way for the last bit of a sum changes all that follows, by 1e-2
    # of a gradient where it falls early.
    program = compiled(ds.make_train_step(RUN, mesh), placed, batch, options=ROW_BY_ROW)
    after, metrics = program(placed, batch)
    return jax.device_get((after, metrics))


@pytest.fixture(scope="module")
def one_device(state):
    return step(state)


def gradients(after):
    """The gradient of every parameter, by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(after.first)
    }


@pytest.mark.parametrize("sizes", MESHES)
def test_a_step_on_a_mesh_is_that_of_one_device(sizes, state, one_device):
    after, metrics = step(state, make_mesh(**sizes))
    expected, metrics_of_one = one_device
    np.testing.assert_allclose(metrics["loss"], metrics_of_one["loss"], rtol=1e-4)
    assert (metrics["expert_counts_LE"] == metrics_of_one["expert_counts_LE"]).all()
    found, right = gradients(after), gradients(expected)
    for name, gradient in right.items():
        error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert error <= 1e-3, (name, error)
        assert not found[name][gradient == 0].any(), name


@pytest.mark.slow
def test_the_same_micro_batch_twice_has_the_gradients_of_once(state):
    # What was added up before must not be added up over the devices once more.
    mesh = make_mesh(jax.devices()[:2], tensor=2)
    once, twice = (gradients(step(state, mesh, count)[0]) for count in (1, 2))
    for name, gradient in once.items():
        np.testing.assert_allclose(
            np.linalg.norm(twice[name] - gradient), 0, atol=1e-5 * np.linalg.norm(gradient),
            err_msg=name,
        )


@pytest.mark.slow
def test_over_a_tensor_axis_gradients_point_where_those_of_one_device_do(state, one_device):
    # Partial sums are rounded to BF16 before they are added: codes that fall the other way for it
    # change what follows by as much as another draw of the roundings would, 0.1 of a gradient.
    after, metrics = step(state, make_mesh(fsdp=4, tensor=2))
    expected, metrics_of_one = one_device
    np.testing.assert_allclose(metrics["loss"], metrics_of_one["loss"], rtol=2e-3)
    assert (metrics["expert_counts_LE"] == metrics_of_one["expert_counts_LE"]).all()
    for (name, b), a in zip(gradients(expected).items(), gradients(after).values(), strict=True):
        norms = np.linalg.norm(a), np.linalg.norm(b)
        np.testing.assert_allclose(*norms, rtol=0.03, err_msg=name)
        assert np.sum(a * b) >= 0.985 * norms[0] * norms[1] > 0, name


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
