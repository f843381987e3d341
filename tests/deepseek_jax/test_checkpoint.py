"""Checkpoints: the same bits back, onto any mesh; only complete ones, the last n of them."""

import contextlib
import dataclasses
import gc
import logging
import shutil

import jax
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import training
from deepseek_jax.checkpoint import Checkpoints
from sharding import make_mesh
from tests.configs import TINY, make_run, make_state, on_device

RUN = make_run(
    dataclasses.replace(TINY, num_layers=2, num_dense_layers=0, num_mtp=0),
    precision=ds.Precision.of("bf16"),
    ema_decay=0.9,
)

# When Orbax fails it drops coroutines, which warn when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture
def collected():
    """Collects what failed restores leave behind, so that it warns here and not elsewhere."""
    yield
    for _ in range(5):
        gc.collect()


@pytest.fixture(scope="module")
def state():
    state = make_state(RUN)
    return dataclasses.replace(
        state, step=np.int32(7), tokens=np.array([2**32 - 1, 5], np.uint32), skipped=np.int32(2)
    )


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A folder with the checkpoints 1 and 2; tests copy it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, dataclasses.replace(on_device(state), step=np.int32(step)))
    checkpoints.wait()
    checkpoints.close()
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(directory, run=RUN, mesh=None, *, step=None):
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        return checkpoints.restore(run, mesh, step=step)


def assert_same_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b),
                            strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), path


def test_a_state_comes_back_bit_by_bit(saved, state):
    restored = restore(saved)
    assert_same_bits(restored, dataclasses.replace(state, step=np.int32(2)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(restored.first)} == {"bfloat16"}


def test_an_earlier_checkpoint_can_be_asked_for(saved):
    assert int(restore(saved, step=1).step) == 1


def test_a_state_goes_onto_a_mesh_and_back(saved, state, tmp_path):
    mesh = make_mesh(fsdp=4, tensor=2)
    restored = restore(saved, RUN, mesh)
    assert_same_bits(restored, dataclasses.replace(state, step=np.int32(2)))
    shardings = training.state_shardings(RUN, mesh)
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    again = Checkpoints(tmp_path / "again")
    again.save(2, restored)
    again.wait()
    assert_same_bits(again.restore(RUN), restored)
    assert_same_bits(again.restore(RUN, make_mesh(fsdp=2, data=4)), restored)


def test_a_step_before_the_latest_is_refused_and_not_left_out_silently(state, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(2, on_device(state))
    with pytest.raises(ValueError, match="checkpoint of step 2, and step 1 is not after it"):
        checkpoints.save(1, on_device(state))
    checkpoints.close()


def test_the_state_may_be_donated_as_soon_as_save_returns(state, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    live = on_device(state)
    checkpoints.save(1, live)
    jax.tree.map(lambda leaf: leaf.delete(), live)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(RUN), state)


def test_a_run_without_average_has_none_in_its_checkpoints(state, tmp_path):
    run = dataclasses.replace(RUN, ema_decay=None)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, dataclasses.replace(on_device(state), ema=None))
    checkpoints.wait()
    assert checkpoints.restore(run).ema is None


def test_the_last_n_are_kept(state, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    small = dataclasses.replace(state, params={"a_D": np.ones(3, np.float32)}, first={},
                                second={}, ema=None, biases={})
    for step in (10, 20, 30, 40):
        checkpoints.save(step, on_device(small))
    checkpoints.wait()
    assert checkpoints.latest == 40
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["30", "40"]


# What is not whole.


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest is None
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        checkpoints.restore(RUN)


def test_every_truncated_file_of_a_checkpoint_is_an_error_or_without_effect(
    copy, saved, collected
):
    files = [path for path in (copy / "2").rglob("*") if path.is_file() and path.stat().st_size]
    expected = restore(saved)
    refused = []
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            assert_same_bits(restore(copy), expected)
        except ValueError as error:
            message = str(error)
            assert str(copy / "2") in message and "\n" not in message
            assert "remove it to go on from an earlier one" in message
            refused.append(path)
        path.write_bytes(whole)
    largest = max(files, key=lambda path: path.stat().st_size)
    assert largest in refused
    assert_same_bits(restore(copy), expected)


def test_with_the_damaged_one_removed_the_one_before_is_used(copy):
    shutil.rmtree(copy / "2")
    checkpoints = Checkpoints(copy)
    assert checkpoints.latest == 1 and int(checkpoints.restore(RUN).step) == 1


def test_a_checkpoint_that_was_being_removed_is_not_spoken_of(copy, state, caplog):
    # A process was killed in between.
    (copy / "1" / "_CHECKPOINT_METADATA").unlink()
    with contextlib.closing(Checkpoints(copy, keep=2)) as checkpoints:
        assert checkpoints.latest == 2
        checkpoints.save(3, on_device(state))
        checkpoints.wait()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(path.name for path in copy.iterdir()) == ["2", "3"]


def test_a_checkpoint_that_was_being_written_is_never_listed(copy):
    # Orbax writes into a folder of a temporary name and renames it when all is there.
    shutil.copytree(copy / "2", copy / "3.orbax-checkpoint-tmp")
    (copy / "4.orbax-checkpoint-tmp-1700000000").mkdir()
    checkpoints = Checkpoints(copy)
    assert checkpoints.latest == 2
    assert int(checkpoints.restore(RUN).step) == 2


@pytest.mark.parametrize("change", ["wider", "with-mtp"])
def test_a_checkpoint_of_another_configuration_is_refused(saved, change, collected):
    config = {
        "wider": dataclasses.replace(RUN.config, expert_ffn_dim=32),
        "with-mtp": dataclasses.replace(RUN.config, num_mtp=1),
    }[change]
    with pytest.raises(ValueError, match="damaged or of another configuration"):
        restore(saved, dataclasses.replace(RUN, config=config))
