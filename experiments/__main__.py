"""The command line, `python -m experiments` or `deepseek-jax`: a table of commands."""

import sys

from experiments.command_line import Command, run

# A name of two words is a member of a family: `bench train`. Modules are imported when chosen.
COMMANDS = {
    "report": Command(
        "experiments.report",
        "report",
        "write the report of a run again, finished or not",
        "runs/tiny",
    ),
}


def main() -> int:
    """Run the command named on the command line and return its exit code."""
    return run(COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
