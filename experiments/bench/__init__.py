"""Benchmarks: one file each, every figure a ratio against a limit or a peer where there is one."""
