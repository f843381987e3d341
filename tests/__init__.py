"""Tests of deepseek_jax, in the same tree as the code."""
