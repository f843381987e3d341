"""`bench accumulation` without a GPU: its kernel call, its errors and its bars."""

import numpy as np
import pytest

from experiments.bench import accumulation
from experiments.bench.accumulation import FAST, NEVER, OFTEN, OURS
from experiments.study.accumulator import accumulate, operands
from tests.experiments import runs


def test_our_product_is_the_product():
    a_MK, b_NK = operands("zero-mean", 128, 256)
    found = accumulation.our_product(a_MK, b_NK)
    np.testing.assert_allclose(found, a_MK @ b_NK.T, rtol=1e-4, atol=1e-4)


def test_a_card_that_is_its_model_holds_all_bars():
    products = {FAST: accumulate, OURS: lambda a, b: accumulate(a, b, promote=128)}
    rows = [
        row for kind in accumulation.KINDS for row in accumulation.errors(kind, products, 4096, 8)
    ]
    assert len(rows) == 8 and all(verdict["holds"] for verdict in accumulation.judge(rows))
    by_name = {(row["data"], row["sum"]): row for row in rows}
    assert by_name["positive", FAST]["error %"] == by_name["positive", NEVER]["error %"] > 5
    assert by_name["positive", OFTEN]["largest %"] < 0.1


def test_exact_sums_miss_the_bar_of_fast_ones():
    rows = accumulation.errors("positive", {FAST: lambda a, b: a @ b.T * (1 + 1e-6)}, 256, 8)
    verdicts = accumulation.judge(rows + [{"data": "positive", "sum": OURS, "error %": 1.0}])
    assert not verdicts[0]["holds"]


@pytest.mark.parametrize(
    ("words", "part"),
    [([], "Hopper GPU"), (["--rows", "100"], "multiple of 128"), (["--elements", "64"], "64")],
)
def test_bad_input_is_one_line(words, part):
    code, out, err = runs.call("bench", "accumulation", *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and part in err
