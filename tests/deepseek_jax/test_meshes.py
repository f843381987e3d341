"""The train step on meshes of eight devices: the numbers of one device, state where it belongs."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import training
from sharding import make_mesh
from sharding.placement import Scheme, under_mesh
from tests.configs import (
    ONE_MTP,
    compiled,
    equations,
    make_batch,
    make_run,
    make_state,
    on_device,
)
from tests.oracle import reference

# Eight experts, from one on each device to all on all; two micro-batches a step.
# The dense feed-forward network is that of the shared experts.
CONFIG = dataclasses.replace(
    ONE_MTP, num_layers=1, num_dense_layers=0, num_experts=8, num_groups=4, groups_per_token=2,
    experts_per_token=3,
)
RUN = make_run(CONFIG, batch=8, batch_size=ds.Schedule.constant(16))
STEPS = 5
MESHES = {
    "expert8-over-2-nodes": ({"expert": 8}, Scheme(expert_nodes=2)),
    "fsdp2-expert2-tensor2": ({"fsdp": 2, "expert": 2, "tensor": 2}, Scheme(room=8)),
    "data2-fsdp4-zero1": ({"data": 2, "fsdp": 4}, Scheme(zero=1)),
    "data2-tensor4": ({"data": 2, "tensor": 4}, Scheme()),
    "data8": ({"data": 8}, Scheme()),
    "fsdp8": ({"fsdp": 8}, Scheme()),
    "expert8": ({"expert": 8}, Scheme()),
    "tensor8": ({"tensor": 8}, Scheme()),
    "data2-fsdp4": ({"data": 2, "fsdp": 4}, Scheme()),
    "data4-expert2": ({"data": 4, "expert": 2}, Scheme()),
    "fsdp2-expert4-zero1": ({"fsdp": 2, "expert": 4}, Scheme(zero=1)),
    "fsdp2-expert4-over-4-nodes": ({"fsdp": 2, "expert": 4}, Scheme(expert_nodes=4)),
    "fsdp4-tensor2-zero1": ({"fsdp": 4, "tensor": 2}, Scheme(zero=1)),
    "expert4-tensor2-over-2-nodes": ({"expert": 4, "tensor": 2}, Scheme(expert_nodes=2, room=8)),
    "data2-fsdp2-expert2-zero1": ({"data": 2, "fsdp": 2, "expert": 2}, Scheme(zero=1)),
}
QUICK = list(MESHES)[:4]


def without_first_moments(state):
    """Those after a step are then the clipped gradient, times 0.1."""
    return dataclasses.replace(state, first=jax.tree.map(np.zeros_like, state.first))


def clear_batch(state, forward):
    """A batch in which no choice of the state is close; all tokens want one expert at least."""
    for seed in range(300):
        batch = make_batch(RUN, accumulation=2, seed=seed)
        tokens = batch["tokens"].reshape(-1, RUN.seq_len + 1)
        if forward(state.params, state.biases, tokens).margin > 1e-4:
            return batch
    raise AssertionError("no batch with clear choices")


@pytest.fixture(scope="module")
def one_device():
    """Five steps on one device, and checked steps from the first state and from the last."""
    state = make_state(RUN)
    # Nearly every token of the first MoE layer goes to the same expert.
    state.biases["moe"]["ffn"]["bias_E"][0, 5] += 1.0
    forward = reference.make_forward(CONFIG)
    batches = [make_batch(RUN, accumulation=2, seed=100 + n) for n in range(STEPS)]
    step = compiled(ds.make_train_step(RUN), state, batches[0])
    on_one = lambda state, batch: jax.device_get(step(on_device(state), on_device(batch)))
    losses, after = [], state
    for batch in batches:
        after, metrics = on_one(after, batch)
        losses.append(float(metrics["loss"]))
    checks = []
    for start in map(without_first_moments, (state, after)):
        batch = clear_batch(start, forward)
        checks.append((start, batch, *on_one(start, batch)))
    return SimpleNamespace(state=state, batches=batches, losses=losses, checks=checks)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow], id=name)
            for name in MESHES],
)
def on_mesh(request, one_device):
    """The same on a mesh; states and metrics stay where they lie."""
    sizes, scheme = MESHES[request.param]
    mesh = make_mesh(**sizes)
    place = lambda state: jax.device_put(on_device(state), training.state_shardings(RUN, mesh))
    step = compiled(ds.make_train_step(RUN, mesh, scheme), place(one_device.state),
                    one_device.batches[0])
    losses, after = [], place(one_device.state)
    for batch in one_device.batches:
        after, metrics = step(after, batch)
        losses.append(float(metrics["loss"]))
    checks = [step(place(start), batch) for start, batch, *_ in one_device.checks]
    return SimpleNamespace(mesh=mesh, losses=losses, checks=checks)


@pytest.fixture(params=[0, 1], ids=["first-step", "after-5-steps"])
def both(request, on_mesh, one_device):
    """(state, metrics) after a checked step: on the mesh, and on one device."""
    return on_mesh.checks[request.param], one_device.checks[request.param][2:]


def test_routing_is_skewed(one_device):
    counts_LE = one_device.checks[0][3]["expert_counts_LE"]
    assert counts_LE[0, 5] > 0.9 * 16 * RUN.seq_len > 2 * counts_LE[0].mean()


@pytest.mark.parametrize("name", ["loss", "mtp_loss", "sequence_loss", "total_loss", "grad_norm"])
def test_losses_are_those_of_one_device(both, name, relative_error, limits):
    (_, actual), (_, expected) = both
    assert int(actual["lost"]) == 0
    assert relative_error(actual[name], expected[name]) < limits["fp32"].value


def test_five_losses_are_those_of_one_device(on_mesh, one_device):
    np.testing.assert_allclose(on_mesh.losses, one_device.losses, rtol=1e-4)


def test_counts_and_biases_are_exactly_those_of_one_device(both):
    (state, metrics), (expected_state, expected) = both
    np.testing.assert_array_equal(metrics["expert_counts_LE"], expected["expert_counts_LE"])
    for a, b in zip(jax.tree.leaves(state.biases), jax.tree.leaves(expected_state.biases),
                    strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("part", ["first", "second", "params"])
def test_gradients_and_parameters_are_those_of_one_device(both, part, relative_error, limits):
    actual, expected = (getattr(state, part) for state, _ in both)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual),
                            jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < limits["fp32"].gradient, path
        assert not np.any(np.asarray(a)[np.asarray(b) == 0]), path


def test_copies_on_different_devices_are_the_same_bits(on_mesh):
    for path, leaf in jax.tree_util.tree_leaves_with_path(on_mesh.checks):
        copies = {}
        for piece in leaf.addressable_shards:
            copies.setdefault(str(piece.index), set()).add(np.asarray(piece.data).tobytes())
        assert all(len(bits) == 1 for bits in copies.values()), path


def test_the_state_stays_where_the_store_table_says(on_mesh):
    wanted = jax.tree.leaves(training.state_shardings(RUN, on_mesh.mesh))
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(on_mesh.checks[0][0]), wanted, strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path


# Only what the expert axis adds: no dense layer, no MTP, one micro-batch.
SMALL = make_run(
    dataclasses.replace(CONFIG, num_mtp=0, experts_per_token=1, groups_per_token=1), batch=8
)


def test_a_step_without_room_changes_nothing_and_its_batch_can_run_again(relative_error, limits):
    state, batch = make_state(SMALL), make_batch(SMALL)
    # All tokens choose one expert.
    state.biases["moe"]["ffn"]["bias_E"][:, 5] += 10.0
    expected, metrics = compiled(ds.make_train_step(SMALL), state, batch)(
        on_device(state), on_device(batch)
    )
    assert metrics["expert_counts_LE"].tolist() == [[0] * 5 + [96, 0, 0]]
    mesh = make_mesh(expert=8)
    after = jax.device_put(on_device(state), training.state_shardings(SMALL, mesh))
    for room, lost in ((4, True), (8, False)):
        step = compiled(ds.make_train_step(SMALL, mesh, Scheme(room=room)), after, batch)
        after, metrics = step(after, batch)
        assert (int(metrics["lost"]) > 0) == lost
        if lost:
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(a, b)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(expected),
                            strict=True):
        assert relative_error(a, b) < limits["fp32"].gradient, path


def test_the_first_state_does_not_depend_on_the_mesh():
    config = dataclasses.replace(ONE_MTP, num_layers=1, num_dense_layers=0, num_mtp=0)
    run = make_run(config)
    expected = compiled(lambda: training._init(run))()
    shardings = training.state_shardings(run, make_mesh(fsdp=4, tensor=2))
    actual = compiled(jax.jit(lambda: training._init(run), out_shardings=shardings))()
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual),
                            jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    pieces = actual.params["moe"]["ffn"]["w_gate_EFD"].addressable_shards
    assert pieces[0].data.shape == (1, 28, 12, 10)


def test_weight_gradients_cross_devices_in_fp32_when_products_are_bf16():
    run = dataclasses.replace(RUN, precision=ds.Precision.of("bf16"))
    mesh = make_mesh(fsdp=8)
    step = under_mesh(lambda state, batch: training.train_step(run, state, batch), mesh)
    traced = jax.make_jaxpr(step)(training.abstract_state(run), make_batch(run, accumulation=2))
    scattered = [v.aval for equation in equations(traced)
                 if equation.primitive.name == "reduce_scatter"
                 and "fsdp" in equation.params["axis_name"] for v in equation.outvars]
    assert {a.dtype for a in scattered} == {jnp.dtype("float32")}
    shapes = {a.shape for a in scattered}
    for path, leaf in jax.tree_util.tree_leaves_with_path(training.abstract_state(run).params):
        stacked = path[0].key in ("dense", "moe", "mtp")
        if "norm" not in path[-1].key:
            spec = training.state_shardings(run, mesh).params
            for part in path:
                spec = spec[part.key]
            assert spec.shard_shape(leaf.shape)[stacked:] in shapes, path
