"""The measure of a program's memory is held against programs whose memory is known."""

import sys

import numpy as np

from tests.peak_memory import run_measured


def test_a_program_is_measured_without_the_memory_of_the_test(tmp_path):
    ballast = np.ones(300 << 20, np.uint8)
    done, small = run_measured([sys.executable, "-c", "print(3)"], tmp_path)
    assert done.stdout == "3\n" and done.returncode == 0
    assert small < 100e6 < ballast.nbytes
    _, large = run_measured([sys.executable, "-c", "bytearray(200 << 20)"], tmp_path)
    assert large - small > 150e6


def test_a_program_that_fails_says_so(tmp_path):
    done, _ = run_measured([sys.executable, "-c", "import sys; sys.exit('no')"], tmp_path)
    assert done.returncode == 1 and done.stderr == "no\n"
