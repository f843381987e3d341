"""Checkpoints loaded here against transformers' reading of them: stored, or computed anew.

With torch and transformers (extra `parity`) installed, `python -m pytest -m slow` of this file
also runs transformers live.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.huggingface import export_arrays, export_specs
from deepseek_jax.huggingface_checkpoint import pairs_from_halves
from deepseek_jax.layers import RoutingBias
from tests.configs import QUICK
from tests.parity import cases

# One of each kind; the rest are slow only because there are many.
QUICKLY = ("halves-not-pairs", "unequal-heads", "negative-bias", "v2-groups")
NAMES = [
    name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in cases.CASES
]


def golden(name):
    """What is stored of a case."""
    with np.load(cases.FILE) as file:
        prefix = f"{name}/"
        return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}


def compute(folder, tokens_BT):
    """Our values by the names of golden.npz, gradients by released names."""
    model, tokens_BT = ds.load_huggingface(folder), jnp.asarray(tokens_BT)
    graphdef, params, biases = nnx.split(model, nnx.Param, RoutingBias)

    def loss_of(params):
        logits_BTV, aux = nnx.merge(graphdef, params, biases)(tokens_BT, hidden=True)
        log_p = jax.nn.log_softmax(logits_BTV[:, :-1])
        loss = -jnp.mean(jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1))
        return loss, (logits_BTV, aux.hidden_LBTD, aux.expert_counts_LE)

    fn = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, values), gradients = fn.lower(params).compile(QUICK)(params)
    logits, hidden, counts = map(np.asarray, values)
    specs = export_specs(model.config, "fp32")
    arrays = export_arrays(nnx.merge(graphdef, gradients, biases), "fp32")
    by_name = {spec.name: array for spec, array in zip(specs, arrays, strict=True)}
    return {"loss": np.asarray(loss), "logits": logits, "hidden": hidden, "counts": counts,
            "gradients": by_name}  # fmt: skip


def assert_same(name, got, want, relative_error, limits):
    """Logits, loss, hidden states, loads, the next tokens and gradients."""
    record, _ = cases.CASES[name]
    limit = limits["fp32"]
    assert relative_error(got["logits"], want["logits"]) < limit.value
    assert relative_error(got["loss"], want["loss"]) < limit.value
    for layer, hidden_BTD in enumerate(want["hidden"]):
        assert relative_error(got["hidden"][layer], hidden_BTD) < limit.value, f"{layer=}"
    np.testing.assert_array_equal(got["counts"], want["counts"])
    best_BT = got["logits"][:, cases.PROMPT - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(best_BT, want["tokens"][:, cases.PROMPT :])
    ours = got["gradients"]
    if record["tie_word_embeddings"]:
        ours["model.embed_tokens.weight"] = (
            ours["model.embed_tokens.weight"] + ours.pop("lm_head.weight")
        )
    for theirs, gradient in want.items():
        if theirs.startswith("grad/"):
            tensor = theirs.removeprefix("grad/")
            mine = gradient_of(tensor, ours, record["n_routed_experts"])
            if record.get("rope_interleave") is False:
                gradient = as_pairs(tensor, gradient, record)
            assert relative_error(mine, gradient) < limit.gradient, tensor


def gradient_of(tensor, ours, num_experts):
    """Our gradient of a tensor of transformers, which keeps all experts in one."""
    if "mlp.experts." not in tensor:
        return ours[tensor]
    prefix, kind = tensor.rsplit(".", 1)
    parts = [k for k in ("gate_proj", "up_proj", "down_proj") if k.split("_")[0] in kind]
    each = lambda e: [ours[f"{prefix}.{e}.{k}.weight"] for k in parts]
    return np.stack([np.concatenate(each(e)) for e in range(num_experts)])


def as_pairs(tensor, gradient, record):
    """The rows of rotary halves in our order."""
    R = record["qk_rope_head_dim"]
    if tensor.endswith("kv_a_proj_with_mqa.weight"):
        return pairs_from_halves(gradient, 0, R)
    if tensor.endswith("q_b_proj.weight"):
        heads = gradient.reshape(record["num_attention_heads"], -1, gradient.shape[-1])
        return pairs_from_halves(heads, 1, R).reshape(gradient.shape)
    return gradient


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_computes_what_transformers_computed(name, tmp_path, relative_error, limits):
    want = golden(name)
    folder = cases.write_checkpoint(name, int(want["seed"]), tmp_path / "checkpoint")
    assert_same(name, compute(folder, want["tokens"]), want, relative_error, limits)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("name", cases.CASES)
def test_a_checkpoint_computes_what_transformers_computes(name, tmp_path, relative_error, limits):
    from tests.parity.make_golden import case_arrays

    folder = tmp_path / "checkpoint"
    want, _ = case_arrays(name, int(golden(name)["seed"]), folder)
    assert_same(name, compute(folder, want["tokens"]), want, relative_error, limits)


def test_stored_outputs_are_small_and_cover_biases_of_both_signs():
    assert cases.FILE.stat().st_size < 5_000_000
    biases = [v for name in cases.CASES for k, v in cases.tensors(name, 0).items() if "bias" in k]
    assert min(map(np.min, biases)) < -0.1 and max(map(np.max, biases)) > 0.1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("name", ["mscales-eps", "v2-groups", "one-mscale"])
@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_transformers_reads_our_exports(name, format, tmp_path, relative_error, limits):
    import torch

    from tests.parity.make_golden import load

    folder = cases.write_checkpoint(name, int(golden(name)["seed"]), tmp_path / "in")
    model = ds.load_huggingface(folder)
    ds.save_huggingface(model, tmp_path / "out", format=format)
    tokens_BT = golden(name)["tokens"]
    with torch.no_grad():
        theirs = load(tmp_path / "out", cases.CASES[name][0])(torch.from_numpy(tokens_BT).long())
    ours = jax.jit(lambda model: model(tokens_BT)[0])(ds.load_huggingface(tmp_path / "out"))
    assert relative_error(theirs.logits.numpy(), ours) < limits["fp32"].value
    if format == "fp32":
        # Rounded weights may choose other experts.
        assert relative_error(theirs.logits.numpy(), golden(name)["logits"]) < limits["fp32"].value
