"""`network`: what it prints of networks, of files, and of what cannot be."""

import json

import pytest

from tests.experiments import runs


def written(tmp_path, *words):
    file = tmp_path / "network.json"
    code, out, err = runs.call("network", *words, "--json", file)
    assert (code, err) == (0, ""), err
    return json.loads(file.read_text()), out


def test_planes_with_nodes_and_a_broken_leaf(tmp_path):
    found, out = written(
        tmp_path, "multi-plane", "--nodes", 64, "--routing", "static", "--broken-switches", 0
    )
    # Eight planes of two leaves and the one spine that they need.
    assert (found["switches"], found["links"], found["diameter"]) == (24, 512, 2)
    assert found["bisection"] == 256 and found["ports used"] == 64
    rates = {row["operation"]: row["GB/s"] for row in found["timings"]}
    assert not {"dispatch FP8"} & set(rates)
    assert rates["all-to-all"] == pytest.approx(50 * 64 / 63, rel=0.01)
    assert found["damage"]["cut_off"] == 32
    assert found["damage"]["slowdown"] == pytest.approx(8 / 7)
    assert "512 GPUs, static routing" in out


def test_experts_are_dispatched_to_where_they_divide(tmp_path):
    found, _ = written(tmp_path, "multi_rail", "--nodes", 4, "--tokens", 512, "--no-pxn")
    rates = {row["operation"]: row["GB/s"] for row in found["timings"]}
    # The own node counts, so the rate is a NIC's times 4 / 3, less latency and uneven draws.
    assert 50 < rates["dispatch FP8"] < 50 * 4 / 3 and 50 < rates["combine BF16"] < 50 * 4 / 3
    found, _ = written(tmp_path, "multi_rail", "--nodes", 3)
    assert [row["operation"] for row in found["timings"]][1:] == ["all-gather or reduce-scatter"]


def test_dispatch_is_left_out_where_four_nodes_hold_too_few_experts(tmp_path):
    found, out = written(tmp_path, "multi_plane", "--nodes", 256, "--gpus", 1)
    assert [row["operation"] for row in found["timings"]] == [
        "all-to-all", "all-gather or reduce-scatter"
    ]  # fmt: skip
    assert "no dispatch: too few experts on the 4 nodes that a token may go to, 1 on each" in out
    # Two experts on each of four nodes are a token's eight, and nodes of one GPU use no NVLink.
    words = ["multi_plane", "--nodes", 128, "--gpus", 1, "--tokens", 16]
    found, out = written(tmp_path, *words)
    rows = {row["operation"]: row for row in found["timings"]}
    assert rows["dispatch FP8"]["NVLink ms"] == 0 and "no dispatch" not in out


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        (["fat_tree_2"], (2048, 96, 2048, 2, 1024)),
        (["fat_tree_3", "--ports", "8"], (128, 80, 256, 4, 64)),
        (["slim_fly", "--q", "5"], (200, 50, 175, 2, 65)),
        (["dragonfly", "--ports", "12"], (342, 114, 456, 3, None)),
        (["multi_rail", "--nodes", "40", "--ports", "16", "--gpus", "4"],
         (192, 64, 384, 4, 96)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_networks_by_name(words, counts, tmp_path):
    found, _ = written(tmp_path, *words)
    expected = dict(
        zip(("endpoints", "switches", "links", "diameter", "bisection"), counts, strict=True)
    )
    for name, value in expected.items():
        assert value is None or found[name] == value, name
    assert found["M$"] == pytest.approx(
        found["switches"] * 0.08195 + found["links"] * 545e-6, rel=1e-9
    )


def network_file(folder, **content):
    path = folder / "mine.json"
    whole = {"ports": 4, "endpoints": [0, 0, 1, 1], "cables": [[0, 1], [0, 1]]}
    path.write_text(json.dumps(whole | content))
    return path


def test_a_network_of_ones_own(tmp_path):
    path = network_file(tmp_path)
    found, _ = written(tmp_path, path, "--nodes", 2, "--gpus", 2)
    assert (found["endpoints"], found["switches"], found["links"]) == (4, 2, 2)
    assert (found["diameter"], found["bisection"], found["ports used"]) == (1, 2, 4)


def test_nodes_that_are_apart_have_no_longest_path(tmp_path):
    path = network_file(tmp_path, endpoints=[0, 1, 1], cables=[[0, 1]])
    for words in (
        [path, "--nodes", 3, "--gpus", 1, "--broken-cables", 0],
        ["multi_plane", "--nodes", 16, "--broken-switches", *range(8)],
    ):
        lost = written(tmp_path, *words)[0]["damage"]
        assert lost["nodes_apart"] > 0 and lost["longer"] is None


@pytest.mark.parametrize(
    ("words", "content", "parts"),
    [
        (["slim_fly", "--q", "28"], None, ["q=28", "27 and 29"]),
        (["slim_fly", "--q", "43"], None, ["66 ports", "ports=64"]),
        (["fat_tree_4"], None, ["unknown network 'fat_tree_4'", "fat_tree_"]),
        (["multi_plane"], None, ["multi_plane needs --nodes"]),
        (["multi_plane", "--nodes", "4000"], None, ["num_nodes=4000", "2048"]),
        (["multi_plane", "--nodes", "0"], None, ["--nodes 0"]),
        (["fat_tree_2", "--ports", "7"], None, ["ports=7", "even"]),
        (["dragonfly", "--ports", "3"], None, ["--ports 3 must be at least 4"]),
        (["fat_tree_2", "--ports", "4", "--nodes", "2"], None, ["16 endpoints", "has 8"]),
        (["fat_tree_2", "--broken-switches", "1"], None, ["need --nodes"]),
        (["multi_plane", "--nodes", "2", "--broken-switches", "99"], None, ["no switch 99"]),
        (["multi_plane", "--nodes", "2", "--mib", "0"], None, ["--mib 0"]),
        (["multi_plane", "--nodes", "2", "--mib", "nan"], None, ["--mib nan"]),
        (["multi_plane", "--nodes", "2", "--tokens", "0"], None, ["--tokens 0"]),
        (["absent.json"], None, ["absent.json"]),
        ([], {"ports": 3}, ["mine.json: mine needs 4 ports on switch 0", "ports=3"]),
        ([], {"cables": [[0, 2]]}, ["mine.json: mine is not connected", "endpoint 2"]),
        ([], {"cables": [[0, 1], [1, 1]]}, ["mine.json: cable [1, 1] joins a switch to itself"]),
        ([], {"cables": [[0]]}, ["mine.json must hold"]),
        ([], {"endpoints": [0, -1]}, ["mine.json must hold", "numbered from 0"]),
        ([], {"endpoints": "none"}, ["mine.json must hold"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_networks_that_cannot_be(words, content, parts, tmp_path):
    words = words if content is None else [network_file(tmp_path, **content), *words]
    code, _, err = runs.call("network", *words)
    assert code == 2 and err.count("\n") == 1, err
    for part in parts:
        assert part in err
