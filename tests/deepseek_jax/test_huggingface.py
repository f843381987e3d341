"""Checkpoint folders: FP8 blocks, round trips, meshes, and damage of every kind."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.huggingface import export_arrays, export_specs
from deepseek_jax.huggingface_checkpoint import open_checkpoint
from deepseek_jax.huggingface_config import config_record
from deepseek_jax.huggingface_names import entries
from deepseek_jax.layers import RoutingBias
from deepseek_jax.tensor_files import DTYPES, Spec, read_header, write_file
from sharding import make_mesh
from tests.configs import TINY, compiled, make_run, make_state
from tests.oracle import weights
from tests.parity import cases

# Rows and columns of its matrices are not multiples of 128, and more than one block.
WIDE = dataclasses.replace(
    TINY, vocab_size=60, model_dim=200, num_layers=2, num_heads=3, content_head_dim=50,
    rotary_head_dim=22, value_head_dim=47, query_latent_dim=140, kv_latent_dim=131,
    dense_ffn_dim=270, expert_ffn_dim=133, num_experts=7, num_shared_experts=1,
    experts_per_token=2, groups_per_token=7, num_mtp=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """TINY with weights of fan-in scale and biases."""
    run = make_run()
    state = make_state(run)
    return ds.training.join(run, state.params, state.biases)


def leaves(model):
    """Every parameter and bias by path."""
    both = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, RoutingBias)))
    return {jax.tree_util.keystr(p): np.asarray(v)
            for p, v in jax.tree_util.tree_leaves_with_path(both)}  # fmt: skip


def test_fp32_comes_back_bit_for_bit_mtp_and_biases_included(model, tmp_path):
    ds.save_huggingface(model, tmp_path / "out", format="fp32")
    again = ds.load_huggingface(tmp_path / "out")
    assert dataclasses.replace(again.config, init_std=TINY.init_std) == TINY
    before, after = leaves(model), leaves(again)
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert value.tobytes() == after[path].tobytes(), path


def test_released_names_and_shapes_are_those_written_down(tmp_path):
    for name in ("yarn-groups", "v2-greedy"):
        folder = cases.write_checkpoint(name, 0, tmp_path / name)
        config = open_checkpoint(folder).config
        assert {e.name: e.shape for e in entries(config)} == cases.shapes(cases.CASES[name][0])


def test_v3_has_the_tensors_of_the_release():
    found = {e.name: e for e in entries(ds.configs.deepseek_v3())}
    # 61 + 1 layers, 59 of them with 256 experts of 3 matrices.
    assert len(found) == 3 + 62 * 9 + 3 * 3 + 59 * (2 + 3 + 256 * 3) + 4
    assert sum(np.prod(e.shape) for e in found.values()) == pytest.approx(671.03e9 + 11.61e9, 1e-3)
    assert found["model.layers.61.eh_proj.weight"].shape == (7168, 14336)
    assert found["model.layers.3.self_attn.kv_b_proj.weight"].shape == (32768, 512)
    assert not found["model.layers.61.eh_proj.weight"].may_be_fp8
    assert found["model.layers.60.mlp.experts.255.down_proj.weight"].may_be_fp8


def test_bf16_is_rounded_once(model, tmp_path):
    ds.save_huggingface(model, tmp_path / "out", format="bf16")
    again = leaves(ds.load_huggingface(tmp_path / "out", precision="fp32"))
    for path, value in leaves(model).items():
        kept = value if "bias_E" in path else value.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(again[path], kept)


def write_fp8(folder, config, seed=0):
    """An FP8 checkpoint with random codes and scales, and what they mean, in float64."""
    draw, meaning, files = np.random.default_rng(seed), {}, {}
    for entry in entries(config):
        if not entry.may_be_fp8:
            scale = 1.0 if len(entry.shape) == 1 else entry.shape[-1] ** -0.5
            value = (draw.standard_normal(entry.shape) * 0.1 * scale
                     + (len(entry.shape) == 1)).astype(ml_dtypes.bfloat16)
            if entry.array.endswith("bias_E"):
                value = value.astype(np.float32) - 1.0
            files[entry.name] = value
            meaning[entry.name] = value.astype(np.float64)
            continue
        codes = draw.integers(0, 127, entry.shape, np.uint8) | (
            draw.integers(0, 2, entry.shape, np.uint8) << 7)
        codes = codes.view(ml_dtypes.float8_e4m3fn)
        blocks = tuple(-(-n // 128) for n in entry.shape)
        scale = draw.uniform(0.5, 2.0, blocks).astype(np.float32) / np.float32(
            100 * entry.shape[1] ** 0.5)
        files |= {entry.name: codes, entry.name + "_scale_inv": scale}
        whole = np.kron(scale.astype(np.float64), np.ones((128, 128)))
        meaning[entry.name] = (
            codes.astype(np.float64) * whole[: entry.shape[0], : entry.shape[1]]
        )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_record(config, format="fp8")))
    names = {v: k for k, v in DTYPES.items()}
    specs = [Spec(n, names[a.dtype], a.shape) for n, a in files.items()]
    write_file(folder / "model.safetensors", specs, iter(files.values()))
    return files, meaning


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "checkpoint"
    return folder, *write_fp8(folder, WIDE)


def test_fp8_blocks_with_short_edges_are_read_as_what_they_mean(fp8, relative_error):
    folder, _, meaning = fp8
    model = ds.load_huggingface(folder)
    exported = zip(export_specs(WIDE, "fp32"), export_arrays(model, "fp32"), strict=True)
    for spec, array in exported:
        np.testing.assert_allclose(array, meaning[spec.name], rtol=1e-6, err_msg=spec.name)


KEPT_IN_FP8 = ds.Precision(weights="fp8")


def test_fp8_kept_as_it_is_comes_back_byte_for_byte(fp8, tmp_path):
    folder, files, _ = fp8
    model = ds.load_huggingface(folder, precision=KEPT_IN_FP8)
    stored = model.moe.ffn.w_gate_EFD.get_value()
    assert stored.codes.dtype == ml_dtypes.float8_e4m3fn and stored.codes.shape == stored.shape
    ds.save_huggingface(model, tmp_path / "out", format="fp8")
    tensors = read_header(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert tensors.keys() == files.keys()
    for name, array in files.items():
        again = tensors[name].read()
        assert again.dtype == array.dtype and again.tobytes() == array.tobytes(), name


def test_logits_of_fp8_kept_are_those_of_the_dequantised_model(fp8, relative_error, limits):
    folder, *_ = fp8
    tokens_BT = jnp.asarray(weights.make_tokens(0, WIDE.vocab_size, (2, 7)))
    logits = [
        compiled(lambda m, x: m(x)[0], model, tokens_BT)(model, tokens_BT)
        for model in (ds.load_huggingface(folder, precision=p) for p in (KEPT_IN_FP8, "fp32"))
    ]
    assert relative_error(*logits) < limits["fp32"].value


def test_fp8_kept_lies_in_the_shards_of_a_mesh(fp8):
    folder, *_ = fp8
    model = ds.load_huggingface(folder, precision=KEPT_IN_FP8,
                                mesh=make_mesh(jax.devices()[:4], fsdp=4))  # fmt: skip
    codes = model.moe.ffn.w_gate_EFD.get_value().codes
    assert codes.sharding.shard_shape(codes.shape)[-1] == WIDE.model_dim // 4


def test_keeping_fp8_needs_fp8(tmp_path):
    folder = cases.write_checkpoint("yarn-groups", 0, tmp_path / "c")
    with pytest.raises(ValueError, match="is F32: use weights='bf16'"):
        ds.load_huggingface(folder, precision=KEPT_IN_FP8)


def test_an_fp8_export_means_nearly_the_same(fp8, tmp_path, relative_error, limits):
    folder, files, meaning = fp8
    ds.save_huggingface(ds.load_huggingface(folder), tmp_path / "out", format="fp8")
    again = ds.load_huggingface(tmp_path / "out")
    tensors = read_header(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
        n: ({v: k for k, v in DTYPES.items()}[a.dtype], a.shape) for n, a in files.items()
    }
    for spec, array in zip(export_specs(WIDE, "fp32"), export_arrays(again, "fp32"), strict=True):
        assert relative_error(array, meaning[spec.name]) < limits["fp8"].value / 2, spec.name


def test_each_device_holds_its_shards_of_a_mesh_and_the_numbers_are_the_same(fp8):
    folder, *_ = fp8
    mesh = make_mesh(jax.devices()[:4], fsdp=4)
    whole, split = leaves(ds.load_huggingface(folder)), ds.load_huggingface(folder, mesh=mesh)
    gate = split.moe.ffn.w_gate_EFD[...]
    assert gate.sharding.shard_shape(gate.shape)[-1] == WIDE.model_dim // 4
    for path, value in leaves(split).items():
        np.testing.assert_array_equal(value, whole[path], err_msg=path)


# Damage.


def edit(folder, **changes):
    """Rewrites the file of an FP8 checkpoint with tensors changed, added or (None) removed."""
    path = folder / "model.safetensors"
    tensors = read_header(path)
    arrays = {name: np.array(t.read()) for name, t in tensors.items()}
    arrays = {**arrays, **{k.replace("__", "."): v for k, v in changes.items()}}
    arrays = {k: v for k, v in arrays.items() if v is not None}
    names = {v: k for k, v in DTYPES.items()}
    write_file(path, [Spec(n, names[a.dtype], a.shape) for n, a in arrays.items()],
               iter(arrays.values()))


@pytest.fixture
def small(tmp_path):
    """A small FP8 checkpoint to damage."""
    config = dataclasses.replace(TINY, num_layers=1, num_dense_layers=1, num_mtp=0)
    write_fp8(tmp_path / "small", config)
    return tmp_path / "small"


GATE = "model__layers__0__mlp__gate_proj__weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lm_head__weight": None}, "tensor lm_head.weight is missing"),
        ({"extra__weight": np.zeros(3, np.float32)}, "unknown tensor extra.weight"),
        ({"model__norm__weight": np.zeros(3, np.float32)}, r"shape \(3,\), config.json asks for"),
        ({"model__norm__weight": np.zeros(40, np.int32)}, "model.norm.weight is I32"),
        ({f"{GATE}_scale_inv": None}, "is in FP8 and has no .*_scale_inv"),
        ({f"{GATE}_scale_inv": np.ones((2, 1), np.float32)}, r"must be F32 \(1, 1\)"),
        ({"model__norm__weight_scale_inv": np.ones((1,), np.float32)}, "the scale of no FP8"),
    ],
    ids=["missing", "unknown", "misshapen", "dtype", "no-scale", "scale-shape", "scale-of-nothing"],
)
def test_tensors_that_do_not_fit_are_named(small, changes, message):
    edit(small, **changes)
    with pytest.raises(ValueError, match=message):
        ds.load_huggingface(small)


def test_fp8_needs_its_block_in_config_json(small):
    record = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(record | {"quantization_config": None}))
    with pytest.raises(ValueError, match="is in FP8, but config.json has no quantization_config"):
        ds.load_huggingface(small)


def test_nan_is_reported_and_can_be_allowed(small):
    norm = np.ones(40, ml_dtypes.bfloat16)
    norm[3] = np.nan
    edit(small, model__norm__weight=norm)
    with pytest.raises(ValueError, match="model.norm.weight holds NaN"):
        ds.load_huggingface(small)
    model = ds.load_huggingface(small, allow_nan=True)
    assert np.isnan(model.final_norm_D[...][3])


@pytest.mark.parametrize("precision", ["fp32", ds.Precision("fp8", "bf16", "bf16")])
def test_scales_that_are_no_numbers_are_reported_also_where_blocks_stay_fp8(small, precision):
    edit(small, **{f"{GATE}_scale_inv": np.full((1, 1), np.nan, np.float32)})
    with pytest.raises(ValueError, match="gate_proj.weight.* holds NaN"):
        ds.load_huggingface(small, precision=precision)
    ds.load_huggingface(small, precision=precision, allow_nan=True)


@pytest.mark.parametrize("name", ["halves-not-pairs", "no-query-latent", "two-dense"])
def test_a_window_of_any_dimension_is_that_of_the_whole_array(name, tmp_path):
    checkpoint = open_checkpoint(cases.write_checkpoint(name, 0, tmp_path / name))
    paths = {entry.array for entry in checkpoint.entries.values()}
    assert any("wkv_a_YD" in path for path in paths)
    for path in paths:
        shape = checkpoint.array_shape(path)
        everything = [slice(0, n) for n in shape]
        whole = checkpoint.fill(path, tuple(everything), np.float32)
        for axis, size in enumerate(shape):
            for part in (slice(0, 1), slice(size // 3, size // 3 + 1), slice(size // 2, size)):
                window = (*everything[:axis], part, *everything[axis + 1 :])
                found = checkpoint.fill(path, window, np.float32)
                np.testing.assert_array_equal(found, whole[window], err_msg=f"{path} {window}")


def two_shards(tmp_path):
    return cases.write_checkpoint("v2-says-normalise", 0, tmp_path / "two")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f, m: m.update({"ghost": "model-00001-of-00002.safetensors"}), "tensor ghost is"),
        (lambda f, m: m.update({"lm_head.weight": "../x.safetensors"}), "which is not there"),
        (lambda f, m: m.update({"lm_head.weight": "gone.safetensors"}), "which is not there"),
        (lambda f, m: m.pop("lm_head.weight"), "lm_head.weight of .* is not in"),
        (lambda f, m: (f / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 20),
         "not a whole safetensors file"),
        (lambda f, m: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f, m: (f / "config.json").write_text("{"), "is not JSON"),
    ],
    ids=["ghost", "outside", "gone", "unlisted", "not-a-file", "no-config", "config-damaged"],
)
def test_a_wrong_index_or_file_is_one_clear_error(tmp_path, damage, message):
    folder = two_shards(tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(folder, index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        ds.load_huggingface(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = two_shards(tmp_path)
    first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="is there twice"):
        ds.load_huggingface(folder)


def test_an_export_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("deepseek_jax.huggingface.write_file", full)
    with pytest.raises(OSError, match="disk full"):
        ds.save_huggingface(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_an_export_lacks_is_found_before_weights_are_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_jax.huggingface.write_file", None)
    with pytest.raises(ValueError, match="format='float32' must be one of .*'fp32'"):
        ds.save_huggingface(model, tmp_path / "out", format="float32")
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        ds.save_huggingface(model, tmp_path / "out", tokenizer=tmp_path / "absent.json")
    assert list(tmp_path.iterdir()) == []


def test_config_json_names_the_tokens_that_begin_and_end_a_text_or_says_that_there_are_none(
    model, tmp_path
):
    # A missing field would be one of the tokens of V3 for those who read it.
    ds.save_huggingface(model, tmp_path / "none")
    ds.save_huggingface(model, tmp_path / "some", bos=3, eos=np.array([5, 6]))
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text())
    tokens = [(read(n)["bos_token_id"], read(n)["eos_token_id"]) for n in ("none", "some")]
    assert tokens == [(None, None), (3, [5, 6])]


def test_an_export_does_not_write_over_a_folder(model, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        ds.save_huggingface(model, tmp_path)


def test_mtp_that_is_announced_and_absent_is_no_mtp(tmp_path):
    folder = cases.write_checkpoint("two-dense", 0, tmp_path / "c")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"num_nextn_predict_layers": 1}))
    assert open_checkpoint(folder).config.num_mtp == 0


def test_weights_of_the_seed_are_the_ones_loaded(tmp_path):
    folder = cases.write_checkpoint("yarn-groups", 3, tmp_path / "c")
    wanted = cases.tensors("yarn-groups", 3)
    model = ds.load_huggingface(folder)
    for spec, array in zip(export_specs(model.config, "fp32"), export_arrays(model, "fp32"),
                           strict=True):  # fmt: skip
        np.testing.assert_array_equal(array, wanted[spec.name], err_msg=spec.name)
    assert weights.make_tokens(0, 5, (2,)).max() < 5


def test_a_tied_head_may_be_stored_when_it_repeats_the_embedding(tmp_path):
    folder = cases.write_checkpoint("tied-no-dense", 0, tmp_path / "c")
    extra = folder / "model-00003-of-00003.safetensors"
    embedding = cases.tensors("tied-no-dense", 0)["model.embed_tokens.weight"]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = extra.name
    path.write_text(json.dumps(index))
    spec = [Spec("lm_head.weight", "F32", embedding.shape)]
    write_file(extra, spec, iter([embedding]))
    model = ds.load_huggingface(folder)
    np.testing.assert_array_equal(model.head_VD[...], embedding)
    write_file(extra, spec, iter([embedding + 1]))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        ds.load_huggingface(folder)
