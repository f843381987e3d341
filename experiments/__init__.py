"""Everything that runs: the command line, training runs, their data and their reports."""
