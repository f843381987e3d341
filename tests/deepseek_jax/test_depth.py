"""The program of a step does not grow with the number of layers."""

import dataclasses
import time

import pytest

import deepseek_jax as ds
from deepseek_jax import training
from sharding import make_mesh
from tests.configs import ONE_MTP, make_batch, make_run

SIZES = {"fsdp": 4, "tensor": 2}


def lowered(layers, mesh):
    config = dataclasses.replace(ONE_MTP, num_layers=layers, num_dense_layers=3)
    run = make_run(config, batch=4, remat="paper")
    step = ds.make_train_step(run, mesh)
    return step.lower(training.abstract_state(run), make_batch(run))


def test_the_program_of_61_layers_is_as_long_as_that_of_8():
    mesh = make_mesh(**SIZES)
    lines = [lowered(layers, mesh).as_text().count("\n") for layers in (8, 61)]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_61_layers_compile_as_fast_as_8():
    mesh, seconds = make_mesh(**SIZES), {8: [], 61: []}
    for _ in range(3):
        for layers, taken in seconds.items():
            program = lowered(layers, mesh)
            began = time.process_time()
            program.compile()
            taken.append(time.process_time() - began)
    assert min(seconds[61]) < 1.2 * min(seconds[8])
