"""Every suffix letter of every array against the configuration's size for it."""

import dataclasses

import jax
import pytest

import deepseek_jax as ds
from deepseek_jax import training
from sharding.rules import letters_of
from tests.configs import TINY, make_run

CONFIGS = {
    "tiny": TINY,
    "no-query-latent": dataclasses.replace(TINY, query_latent_dim=None),
    "no-shared-experts": dataclasses.replace(TINY, num_shared_experts=0),
    "softmax": dataclasses.replace(TINY, score="softmax"),
    "no-mtp": dataclasses.replace(TINY, num_mtp=0),
    "no-dense-layers": dataclasses.replace(TINY, num_dense_layers=0),
    "no-moe-layers": dataclasses.replace(TINY, num_dense_layers=4),
    **{name: make() for name, make in ds.configs.NAMED.items()},
}


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS), scope="module")
def state(request):
    """The abstract state of a run of a configuration."""
    config = CONFIGS[request.param]
    return config, training.abstract_state(make_run(config))


def walk(tree):
    """(keys of the path, shape) of every leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield [key.key for key in path], leaf.shape


def expected_shape(config, keys):
    """What the configuration and the place in the tree say about an array of this name."""
    sizes = {
        "V": config.vocab_size,
        "D": config.model_dim,
        "N": config.num_heads,
        "H": config.content_head_dim,
        "R": config.rotary_head_dim,
        "A": config.content_head_dim + config.rotary_head_dim,
        "U": config.value_head_dim,
        "X": config.content_head_dim + config.value_head_dim,
        "Q": config.query_latent_dim,
        "C": config.kv_latent_dim,
        "Y": config.kv_latent_dim + config.rotary_head_dim,
        "Z": 2 * config.model_dim,
        "E": config.num_experts,
    }
    if "shared" in keys:
        sizes["F"] = config.num_shared_experts * config.expert_ffn_dim
    else:
        sizes["F"] = config.expert_ffn_dim if "E" in letters_of(keys[-1]) else config.dense_ffn_dim
    stacks = {
        "dense": config.num_dense_layers,
        "moe": config.num_layers - config.num_dense_layers,
        "mtp": config.num_mtp,
    }
    leading = (stacks[keys[0]],) if keys[0] in stacks else ()
    return leading + tuple(sizes[letter] for letter in letters_of(keys[-1]))


def test_all_sizes_of_the_tiny_configuration_differ():
    config = TINY
    sizes = [
        config.vocab_size, config.model_dim, 2 * config.model_dim, config.num_heads,
        config.content_head_dim, config.rotary_head_dim, config.rotary_head_dim // 2,
        config.query_key_dim, config.value_head_dim,
        config.content_head_dim + config.value_head_dim, config.query_latent_dim,
        config.kv_latent_dim, config.cache_dim, config.dense_ffn_dim, config.expert_ffn_dim,
        config.shared_ffn_dim, config.num_experts, config.experts_per_token, config.num_groups,
        config.groups_per_token, config.num_layers, config.num_dense_layers,
        config.num_moe_layers, config.num_mtp,
    ]  # fmt: skip
    assert len(set(sizes)) == len(sizes), sorted(sizes)


def test_every_letter_of_every_array_is_the_size_the_configuration_gives_it(state):
    config, state = state
    for tree in (state.params, state.biases, state.first, state.second):
        for keys, shape in walk(tree):
            assert shape == expected_shape(config, keys), ".".join(keys)


def test_parameters_are_those_the_configuration_asks_for(state):
    config, state = state
    names = {".".join(keys) for keys, _ in walk(state.params)}
    stacks = {name.split(".")[0] for name in names} - {"embed_VD", "head_VD", "final_norm_D"}
    counts = {"dense": config.num_dense_layers, "moe": config.num_moe_layers,
              "mtp": config.num_mtp}
    assert stacks == {name for name, count in counts.items() if count}
    compressed = config.query_latent_dim is not None
    assert any("wq_a_QD" in name for name in names) == compressed
    assert any("q_norm_Q" in name for name in names) == compressed
    assert any("wq_NAD" in name for name in names) == (not compressed)
    has_moe = config.num_moe_layers > 0
    shared = [name for name in names if ".shared." in name]
    assert bool(shared) == bool(config.num_shared_experts and has_moe)
    biases = {".".join(keys) for keys, _ in walk(state.biases)}
    expected = {"moe.ffn.bias_E"} if has_moe else set()
    if has_moe and config.num_mtp:
        expected.add("mtp.block.ffn.bias_E")
    assert biases == (expected if config.score == "sigmoid" else set())


def test_no_letter_is_outside_the_alphabet(state):
    _, state = state
    for keys, _ in walk(state.params):
        assert set(letters_of(keys[-1])) <= set("VDNAUXQCYZEF"), ".".join(keys)
