"""Meshes from the command line, what they refuse, and who reads which sequences."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import deepseek_jax as ds
from experiments import devices, train
from experiments.devices import Devices, MeshArgs, devices_of, place_batch
from sharding import make_mesh
from sharding.placement import Scheme
from tests.configs import ONE_MTP, make_run
from tests.experiments.runs import ROOT

CONFIG = dataclasses.replace(ONE_MTP, num_experts=8, num_groups=4, groups_per_token=2,
                             experts_per_token=3)
RUN = make_run(CONFIG, batch=8)


def asked(mesh, run=RUN, batch=8, **more):
    return devices_of(MeshArgs(mesh=mesh, **more), run, batch=batch)


def test_one_cpu_device_is_used_unless_a_mesh_is_asked_for():
    assert devices_of(MeshArgs(), RUN, batch=8) == Devices(None, Scheme())
    found = asked("expert=4,tensor=2", zero=1, devices_per_node=4)
    assert dict(found.mesh.shape) == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 2}
    assert found.scheme == Scheme(zero=1, expert_nodes=2, room=devices.ROOM)
    assert str(found) == "8 x cpu (cpu), expert=4,tensor=2, zero 1, expert over 2 nodes"
    # Forward passes lose no token, whatever the load.
    assert devices_of(MeshArgs(mesh="expert=8"), RUN).scheme.room is None


def test_a_placement_is_read_and_must_fit(tmp_path):
    file = tmp_path / "placement.json"
    table = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 2]] * 4
    file.write_text(json.dumps({devices.TABLE: table}))
    found = asked("data=2,expert=4", placement=file)
    assert found.scheme.placement == tuple(map(tuple, table))
    for mesh, text, parts in (
        (None, json.dumps({devices.TABLE: table}), ["--placement needs --mesh"]),
        ("expert=8", json.dumps({devices.TABLE: table}), ["8 experts in 12 places", "not 8"]),
        ("data=2,expert=4", json.dumps({devices.TABLE: table[:2]}), ["(2, 12)", "4 layers"]),
        ("data=2,expert=4", json.dumps({devices.TABLE: [[0.5]]}), ["place RUN --devices 4"]),
        ("data=2,expert=4", json.dumps(table), ["must be a placement"]),
        ("data=2,expert=4", "[", ["must be a placement"]),
        ("data=2,expert=4", None, ["must be a placement", "place RUN --devices 4 --json"]),
    ):
        file.unlink()
        if text is not None:
            file.write_text(text)
        with pytest.raises(ValueError) as error:
            asked(mesh, placement=file)
        assert all(part in str(error.value) for part in parts), error.value


def test_a_cpu_stands_for_as_many_devices_as_a_mesh_names():
    code = "import jax; from experiments.devices import make_cpu_devices as make; "
    code += "make('data=4,expert=2', processes=2); print(jax.device_count()); make('expert=2')"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("4\n", "")


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("data=4,model=2", "unknown mesh axis 'model': the axes are data, fsdp, expert, tensor"),
        ("fsdp=3", "mesh fsdp=3 makes 6 devices, and there are 8"),
        ("fsdp=2,fsdp=4", "--mesh fsdp=2,fsdp=4 names fsdp twice"),
        ("fsdp=two", "--mesh 'fsdp=two' must be AXIS=SIZE"),
        ("expert=8", "mesh expert=8: expert=8 must divide num_experts=28"),
        ("tensor=4", "mesh data=2,tensor=4: tensor=4 must divide num_heads=6"),
        ("data=8", "mesh data=8 splits a batch over 8 devices, which must divide micro_batch=4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_both_values(mesh, message):
    config = dataclasses.replace(ONE_MTP, num_heads=6)
    run = make_run(config if "expert" in mesh or "tensor" in mesh else CONFIG, batch=4)
    with pytest.raises(ValueError, match=f"^{message}"):
        asked(mesh, run, batch=4)


def test_a_tensor_cut_inside_a_block_of_fp8_is_refused_with_the_nearest_that_is_not():
    config = dataclasses.replace(CONFIG, num_heads=8, dense_ffn_dim=1024, expert_ffn_dim=384,
                                 num_shared_experts=1)
    run = make_run(config, batch=8, precision=ds.Precision.of("fp8"))
    message = "tensor=2 cuts expert_ffn_dim=384 into parts of 192, inside a block of 128: the "
    with pytest.raises(ValueError, match=f"mesh .*: {message}nearest that does not is tensor="):
        asked("tensor=2,data=4", run)


@pytest.mark.parametrize(
    "count, batch, sizes",
    [
        (1, 8, {}), (2, 8, {"expert": 2}), (8, 8, {"expert": 8}),
        (8, 2, {"expert": 2, "tensor": 4}),
        (32, 64, {"fsdp": 4, "expert": 8}), (6, 6, {"fsdp": 3, "expert": 2}),
    ],
)
def test_a_sensible_mesh_for_any_number_of_devices(count, batch, sizes):
    found = devices.default_sizes(RUN, count, batch, 8)
    assert {axis: n for axis, n in found.items() if n > 1} == sizes


def test_no_mesh_for_a_number_that_nothing_divides():
    with pytest.raises(ValueError, match="no mesh of 7 devices divides micro_batch=8"):
        devices.default_sizes(RUN, 7, 8, 8)


def test_a_batch_is_read_once_for_each_part_that_devices_ask_for():
    mesh, read = make_mesh(fsdp=4, tensor=2), []

    def sequences(first, count):
        read.append((first, count))
        return {"tokens": np.arange(first, first + count)[:, None] * 10 + np.arange(5)[None]}

    batch = place_batch(sequences, (2, 8, 5), mesh)["tokens"]
    expected = (np.arange(16)[:, None] * 10 + np.arange(5)).reshape(2, 8, 5)
    np.testing.assert_array_equal(batch, expected)
    np.testing.assert_array_equal(place_batch(sequences, (2, 8, 5), None)["tokens"], expected)
    # Two micro-batches, four parts of two sequences; and the whole for a single device.
    assert sorted(read) == sorted([(a * 8 + b, 2) for a in range(2) for b in range(0, 8, 2)]
                                  + [(0, 16)])
    assert batch.addressable_shards[0].data.shape == (2, 2, 5)


def test_a_step_that_lost_tokens_runs_again_with_the_next_power_of_two(monkeypatch):
    asked_for, said = [], []

    def make(run, mesh, scheme):
        def step(state, batch):
            asked_for.append((scheme.room, state, batch["tokens"].item()))
            return state + (scheme.room >= 6), {"lost": 0 if scheme.room >= 6 else 7}

        program = SimpleNamespace(compile=lambda: step)
        return SimpleNamespace(lower=lambda *args: program)

    monkeypatch.setattr(train, "make_train_step", make)
    where = Devices(None, Scheme(room=1.5))
    steps = train.CompiledSteps(RUN, np.zeros(()), where, said.append)
    batch = {"tokens": np.int32(3)}
    state, _ = steps(0, batch)
    state, _ = steps(state, batch)
    # The second step begins with the room that the first needed.
    assert asked_for == [(1.5, 0, 3), (2.0, 0, 3), (4.0, 0, 3), (8.0, 0, 3), (8.0, 1, 3)]
    assert len(said) == 3 and "no room for 7 choices" in said[0]
    assert "buffers for 2 times an even load instead of 1.5" in said[0]
