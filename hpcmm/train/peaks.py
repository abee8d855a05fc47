"""The most floating-point operations a second that a GPU can do, by its name and the precision of its inputs."""

from __future__ import annotations

import re

_T = 1e12
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"GB[23]00", {"fp8": 5000, "bf16": 2500, "fp16": 2500, "tf32": 1250, "fp32": 80}),
    (r"B[23]00", {"fp8": 4500, "bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75}),
    (r"H20\b", {"fp8": 296, "bf16": 148, "fp16": 148, "tf32": 74, "fp32": 44}),
    (r"H200 NVL", {"fp8": 1670.5, "bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    (
        r"H200|GH200|H100.*(SXM|HBM3)|H800.*SXM",
        {"fp8": 1978.9, "bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    ),
    (r"H100.*NVL", {"fp8": 1670.5, "bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    (r"H100.*PCIe|H800.*PCIe", {"fp8": 1513, "bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51.2}),
    (r"A100|A800", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    (r"A30\b", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    (r"A40\b", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"A10\b", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    (r"L40S", {"fp8": 733, "bf16": 362.05, "fp16": 362.05, "tf32": 183, "fp32": 91.6}),
    (r"L40\b", {"fp8": 362, "bf16": 181.05, "fp16": 181.05, "tf32": 90.5, "fp32": 90.5}),
    (r"L4\b", {"fp8": 242.5, "bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    (r"V100.*(SXM2|SXM3)", {"fp16": 125, "fp32": 15.7}),
    (r"V100.*PCIE", {"fp16": 112, "fp32": 14}),
    (r"T4\b", {"fp16": 65, "fp32": 8.1}),
    (r"RTX A6000", {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7}),
    (r"MI300X|MI325X", {"fp8": 2614.9, "bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
    (r"MI250X", {"bf16": 191.5, "fp16": 191.5, "fp32": 47.9}),
)
"""In 10^12 a second, without sparsity: the makers' data sheets, whose figures "with sparsity" are halved. A device of
MI250X is one of its two dies. Matched in this order against the name that PyTorch gives the device."""


def peak_flops(device: str, precision: str) -> float | None:
    """Floating-point operations a second of one ``device``; None if it is not in the table.

    ``precision``: ``fp8``, ``bf16``, ``fp16``, ``tf32`` (float32 tensors whose products are rounded to it), or
    ``fp32``.
    """
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device, re.IGNORECASE):
            return peaks[precision] * _T if precision in peaks else None
    return None
