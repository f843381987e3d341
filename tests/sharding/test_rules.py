"""The three letter tables: specs of examples, of all of V3, and of the exceptions."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

import deepseek_jax as ds
from deepseek_jax import training
from sharding.rules import ACTIVATIONS, COMPUTE, STORE, letters_of, spec, weight_spec

SMALL = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2}
# The layout the paper's scale calls for: 2048 devices.
LARGE = {"data": 1, "fsdp": 32, "expert": 64, "tensor": 1}


def test_letters_are_read_off_the_end_of_a_name():
    assert letters_of("w_gate_EFD") == "EFD"
    assert letters_of("final_norm_D") == "D"


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("w_gate_EFD", (8, 16, 32), P("expert", "tensor", "fsdp")),
        ("w_down_EDF", (8, 32, 16), P("expert", "fsdp", "tensor")),
        ("wq_a_QD", (24, 32), P(None, ("fsdp", "expert"))),
        ("wq_b_NAQ", (4, 6, 24), P("tensor", None, ("fsdp", "expert"))),
        ("wkv_a_YD", (18, 32), P(None, ("fsdp", "expert"))),
        ("wkv_b_NXC", (4, 6, 12), P("tensor", None, ("fsdp", "expert"))),
        ("wo_DNU", (32, 4, 8), P(("fsdp", "expert"), "tensor", None)),
        ("embed_VD", (64, 32), P("tensor", ("fsdp", "expert"))),
        ("w_join_DZ", (32, 64), P(("fsdp", "expert"), None)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_weights_are_stored(name, shape, expected):
    assert weight_spec(name, shape, STORE, SMALL) == expected


def test_stacked_layers_pad_left():
    assert weight_spec("w_gate_EFD", (3, 8, 16, 32), STORE, SMALL) == P(
        None, "expert", "tensor", "fsdp"
    )


def test_an_axis_is_used_once_and_the_next_letter_takes_it():
    # D = 6 takes fsdp and leaves expert, which Q = 8 then takes.
    assert weight_spec("wq_a_QD", (8, 6), STORE, SMALL) == P("expert", "fsdp")
    # What the first table rows leave of an axis other letters hold.
    assert weight_spec("wkv_b_NXC", (8, 6, 9), STORE, SMALL) == P(
        ("tensor", "fsdp", "expert"), None, None
    )


def test_a_letter_that_no_axis_divides_stays_whole():
    assert weight_spec("wo_DNU", (7, 3, 9), STORE, SMALL) == P(None, None, None)
    # Each axis of a letter stands for itself: 10 divides by 2 but not by 4.
    assert weight_spec("w_join_DZ", (10, 21), STORE, SMALL) == P("fsdp", None)


@pytest.mark.parametrize("name", ["final_norm_D", "q_norm_Q", "kv_norm_C", "bias_E"])
def test_vectors_stay_whole(name):
    assert weight_spec(name, (3, 8), STORE, SMALL) == P(None, None)


def test_products_see_the_router_whole():
    assert weight_spec("router_ED", (8, 32), STORE, SMALL) == P("expert", "fsdp")
    assert weight_spec("router_ED", (8, 32), COMPUTE, SMALL) == P(None, None)


def test_products_see_weights_gathered_over_fsdp():
    assert weight_spec("w_gate_EFD", (8, 16, 32), COMPUTE, SMALL) == P("expert", "tensor", None)
    assert weight_spec("wq_b_NAQ", (4, 6, 24), COMPUTE, SMALL) == P("tensor", None, None)


@pytest.mark.parametrize(
    "letters, shape, expected",
    [
        ("BTD", (8, 16, 32), P(("data", "fsdp", "expert"), "tensor", None)),
        ("BTNA", (8, 16, 4, 6), P(("data", "fsdp", "expert"), None, "tensor", None)),
        ("BTF", (8, 16, 32), P(("data", "fsdp", "expert"), None, "tensor")),
        ("TD", (16, 32), P(("data", "fsdp", "expert", "tensor"), None)),
        ("BTD", (2, 16, 32), P("data", "tensor", None)),
        ("BTD", (2, 15, 32), P("data", None, None)),
    ],
    ids=["sequence", "heads", "hidden", "folded-batch", "small-batch", "odd-sequence"],
)
def test_where_activations_lie(letters, shape, expected):
    assert spec(letters, shape, ACTIVATIONS, SMALL) == expected


# All of V3.


@pytest.fixture(scope="module")
def v3():
    run = ds.Run(
        config=ds.configs.deepseek_v3(),
        steps=1,
        seq_len=4096,
        micro_batch=1,
        batch_size=ds.Schedule.constant(1),
        learning_rate=ds.Schedule.constant(1e-4),
    )
    leaves = jax.tree_util.tree_leaves_with_path(training.abstract_state(run).params)
    return [(path[-1].key, leaf.shape) for path, leaf in leaves]


def ways(name, shape, axis_sizes):
    """In how many pieces a weight is stored."""
    entries = weight_spec(name, shape, STORE, axis_sizes)
    axes = [axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else
                                                   entry or ())]
    return math.prod(axis_sizes[axis] for axis in axes)


CLUSTERS = [
    {"data": 1, "fsdp": 32, "expert": 64, "tensor": 1},
    {"data": 1, "fsdp": 8, "expert": 32, "tensor": 8},
    {"data": 4, "fsdp": 64, "expert": 8, "tensor": 1},
]
ids = lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


@pytest.mark.parametrize("sizes", CLUSTERS, ids=ids)
def test_every_matrix_of_v3_is_stored_in_as_many_pieces_as_devices_that_share_a_copy(v3, sizes):
    for name, shape in v3:
        if len(letters_of(name)) > 1:
            tensor = sizes["tensor"] if set(letters_of(name)) & set("NFV") else 1
            assert ways(name, shape, sizes) == sizes["fsdp"] * sizes["expert"] * tensor, name


def test_a_device_stores_its_share_of_v3(v3):
    held = sum(math.prod(shape) // ways(name, shape, LARGE) for name, shape in v3)
    total = sum(math.prod(shape) for _, shape in v3)
    # Vectors are whole.
    assert held / (total / 2048) < 1.005


def test_low_rank_matrices_of_v3(v3):
    shapes = dict(v3)
    at = lambda name: weight_spec(name, shapes[name], STORE, LARGE)
    assert at("wq_a_QD") == P(None, "expert", "fsdp")
    assert at("wq_b_NAQ") == P(None, ("tensor", "expert"), None, "fsdp")
    assert at("wkv_b_NXC") == P(None, ("tensor", "expert"), None, "fsdp")
