"""Runs a program and says how much memory it held at most: it alone, not whoever started it."""

import subprocess
import sys

# Linux counts what the starting process held towards a child's peak, and a test run can hold
# gigabytes: a small process stands between.
_BETWEEN = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
sys.exit(code)
"""


def run_measured(command, folder, **options) -> tuple[subprocess.CompletedProcess[str], int]:
    """What `command` printed and its peak in bytes; `options` are those of `subprocess.run`.

    The figure travels in a file of `folder`, so that what was printed stays the command's own.
    """
    path = folder / "peak_bytes"
    path.unlink(missing_ok=True)
    between = [sys.executable, "-c", _BETWEEN, str(path), *command]
    done = subprocess.run(between, capture_output=True, text=True, **options)
    return done, int(path.read_text())
