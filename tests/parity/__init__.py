"""Tiny checkpoints as transformers computes them, stored and live."""
