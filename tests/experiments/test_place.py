"""`place`: placements from the loads of a run and of a file."""

import json

import numpy as np
import pytest

from experiments.place import redundant
from sharding.expert_placement import balance, busiest_over_mean, placement
from tests.experiments import runs


def loads_file(folder, loads):
    path = folder / "loads.json"
    path.write_text(loads if isinstance(loads, str) else json.dumps(loads))
    return path


def test_the_loads_of_a_run_are_evened_out(trained, tmp_path):
    file = tmp_path / "placed.json"
    code, out, err = runs.call("place", trained.run, "--devices", 4, "--json", file)
    assert (code, err) == (0, "")
    written = json.loads(file.read_text())
    assert (written["places"], written["devices"]) == (12, 4)
    rows = written["busiest over mean"]
    # A layer of the model and the MTP module's.
    assert [row["layer"] for row in rows] == ["Layer 1", "MTP module 1"]
    load_LE = np.mean([line["expert_load_LE"] for line in runs.metrics(trained.run)], axis=0)
    placed = balance(load_LE, places=12, devices=4)
    np.testing.assert_allclose(
        [row["placed"] for row in rows], busiest_over_mean(load_LE, placed, 4)
    )
    better = placement(np.array(written["expert of each place"]), 8)
    np.testing.assert_allclose(
        [row["improved"] for row in rows], busiest_over_mean(load_LE, better, 4)
    )
    for row in rows:
        assert 1 <= row["improved"] <= row["placed"] <= row["in order"]
        assert row["improved"] <= 1.1 and row["later half"] >= 1
    assert "predicted gain" in out and "after placement" in out


def test_the_last_steps_alone_can_be_looked_at(trained, tmp_path):
    file = tmp_path / "placed.json"
    assert runs.call("place", trained.run, "--devices", 2, "--last", 1, "--json", file)[0] == 0
    load_LE = np.array(runs.metrics(trained.run)[-1]["expert_load_LE"])
    written = json.loads(file.read_text())
    better = placement(np.array(written["expert of each place"]), 8)
    np.testing.assert_allclose(
        [row["improved"] for row in written["busiest over mean"]],
        busiest_over_mean(load_LE, better, 2),
    )


def test_copies_of_v3_are_an_eighth():
    assert redundant(256, 32) == 32 and redundant(256, 144) == 32 and redundant(8, 4) == 4


def test_a_single_device_has_no_copies_by_default(tmp_path):
    code, out, err = runs.call("place", loads_file(tmp_path, [[1, 2, 3, 9]]), "--devices", 1)
    assert (code, err) == (0, "")
    assert "4 experts and 0 copies on 1 devices" in " ".join(out.split())
    assert redundant(16, 1) == 0 and redundant(16, 2) == 2 and redundant(1, 3) == 2


def test_loads_of_any_size_are_placed_alike(tmp_path):
    found = []
    for scale in (1, 1e308, 2.0**-1070):
        loads = [[scale, scale, scale / 4, scale / 4]]
        path, file = loads_file(tmp_path, loads), tmp_path / "placed.json"
        code, out, err = runs.call("place", path, "--devices", 2, "--json", file)
        assert (code, err) == (0, "") and "nan" not in out
        found.append(json.loads(file.read_text()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("loads", "words", "parts"),
    [
        ([[1, 2, 3, 4]], ["--devices", "3", "--copies", "1"], ["places=5", "devices=3", "use 6"]),
        ([[1, 2, 3, 4]], ["--devices", "2", "--copies", "-2"], ["places=2", "experts=4"]),
        ([[1, 2, 3, 4]], ["--devices", "4", "--nodes", "3"], ["devices=4", "nodes=3"]),
        ([[1, 2, 3, 4]], ["--devices", "2", "--groups", "3"], ["experts=4", "groups=3"]),
        ([[1, 2, 3, 4]], ["--devices", "0"], ["--devices 0"]),
        ([[1, 2, 3, 4]], ["--devices", "2", "--copies", "5"], ["--copies 5", "more than 4"]),
        ([[1, -2]], ["--devices", "2"], ["not negative"]),
        ([[1, 2], [3]], [], ["loads.json", "equally long"]),
        ([1, 2], [], ["loads.json", "list of lists"]),
        ([["a"]], [], ["loads.json", "numbers"]),
        ([["1", "2"]], [], ["loads.json", "numbers"]),
        ([[1, None]], [], ["loads.json", "numbers"]),
        ("[[1, NaN]]", ["--devices", "2"], ["finite"]),
        ("not json", [], ["loads.json", "JSON"]),
        ([[1, 2]], ["--last", "0"], ["--last 0"]),
        (None, [], ["absent"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and value and
    isinstance(value[0], str) else "",
)  # fmt: skip
def test_placements_that_cannot_be(loads, words, parts, tmp_path):
    path = tmp_path / "absent" if loads is None else loads_file(tmp_path, loads)
    code, out, err = runs.call("place", path, *words)
    assert code == 2 and out == "" and err.count("\n") == 1, err
    for part in parts:
        assert part in err
