"""LogFMT-n: n-bit codes that are equal steps of the logarithm between a tile's extremes."""

from pallas_kernels.logfmt.api import LogFMT, decode_logfmt, encode_logfmt, round_to_logfmt

__all__ = ["LogFMT", "decode_logfmt", "encode_logfmt", "round_to_logfmt"]
