"""Causal attention with a query/key head wider than the value head, for training and prefill."""

from pallas_kernels.mla_attention.api import mla_attention

__all__ = ["mla_attention"]
