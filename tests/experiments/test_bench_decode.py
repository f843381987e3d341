"""`bench decode`: what it counts, and what it refuses."""

import json

import pytest
from flax import nnx

from deepseek_jax.config import Precision
from deepseek_jax.model import Model
from experiments.bench import decode
from tests.deepseek_jax.test_generate import SMALL
from tests.experiments import runs


def test_a_row_for_each_batch_with_its_figures(tmp_path, monkeypatch):
    monkeypatch.setitem(decode.MODELS, "hundred_million", lambda: SMALL)
    words = ["--batch", 1, 2, "--precision", "fp32", "--prompt", 4, "--new", 6, "--repeats", 1]
    code, out, err = runs.call("bench", "decode", *words, "--json", tmp_path / "rows.json")
    assert (code, err) == (0, "") and "bench decode" in out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["batch"] for row in rows] == [1, 2] and rows[0]["products"] == "fp32"
    for row in rows:
        # Six steps and what came before them are the whole.
        whole = 6 * row["ms_per_step"] + row["prompt_ms"]
        assert row["batch"] * 6 / row["tokens_per_second"] == pytest.approx(whole / 1e3)
        assert row["cache_bytes"] == row["batch"] * 2 * 256 * SMALL.cache_dim * 4


def test_a_step_reads_active_weights_and_caches():
    config = decode.peer_config()
    model = nnx.eval_shape(
        lambda: Model(config, precision=decode.PRECISIONS["bf16"], rngs=nnx.Rngs(0))
    )
    # 0.64 B active with the embedding, of which a token reads one row.
    active, cache = 573e6, 6 * 576 * 2
    assert decode.bytes_per_step(model, 1, 0) == pytest.approx(2 * active, rel=0.02)
    more = decode.bytes_per_step(model, 1, 1000) - decode.bytes_per_step(model, 1, 0)
    assert more == 1000 * cache
    # 128 tokens choose every expert of the 64.
    everything = 3.15e9 - config.vocab_size * config.model_dim
    assert decode.bytes_per_step(model, 128, 0) == pytest.approx(2 * everything, rel=0.02)


def test_about_a_hundred_million_parameters():
    counts = decode.param_counts(decode.hundred_million_config())
    assert 0.9e8 < counts.total_without_mtp < 1.2e8 and counts.active < 0.4e8
    assert decode.PRECISIONS["fp32"] == Precision()


@pytest.mark.parametrize(
    "words, message",
    [(["llama"], "unknown model 'llama'"), (["--precision", "int8"], "unknown precision 'int8'")],
)
def test_what_is_not_known_is_refused(words, message):
    code, _, err = runs.call("bench", "decode", *words)
    assert code == 2 and message in err
