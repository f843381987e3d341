"""Figures of accelerators, each with its source."""

# Dense BF16 matrix peak in FLOP/s, by the start of the device kind that JAX reports.
PEAK_BF16_FLOPS: dict[str, float] = {
    "NVIDIA H100": 989e12,  # NVIDIA H100 SXM datasheet; the paper's figure for the H800
    "NVIDIA H200": 989e12,  # NVIDIA H200 SXM datasheet
    "NVIDIA H800": 989e12,
    "NVIDIA A100": 312e12,  # NVIDIA A100 datasheet
    "NVIDIA B200": 2250e12,  # NVIDIA B200 datasheet, dense
    "TPU v4": 275e12,  # Google Cloud TPU system pages, this and the next
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense BF16 FLOP/s of a device kind; None where the figure is not known (a CPU, say)."""
    for name, peak in PEAK_BF16_FLOPS.items():
        if device_kind.startswith(name):
            return peak
    return None
