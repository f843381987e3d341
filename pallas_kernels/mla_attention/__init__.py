"""Causal attention with a query/key head wider than the value head, for training and prefill."""

from pallas_kernels.mla_attention.api import (
    mla_attention,
    mla_attention_backward,
    mla_attention_forward,
)

__all__ = ["mla_attention", "mla_attention_backward", "mla_attention_forward"]
