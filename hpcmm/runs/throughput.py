"""How much a run gets through: tokens and floating-point operations a second, and memory, as its ranks noted them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.files import read_tail
from hpcmm.runs.metrics import (
    BYTES_OF_A_LINE,
    MOST_TAILS_OF_OTHERS,
    TAIL_BYTES,
    head_records,
    rank_files,
    whole_records,
)
from hpcmm.runs.ownership import is_mine
from hpcmm.runs.run_dir import RunDir

_MOST = 1e30
"""No sum of a rank's is larger."""


@dataclass(frozen=True)
class Throughput:
    """How much a run gets through, over the newest steps that its ranks noted; zero or None is not known."""

    steps: int
    tokens_per_s: float
    """Of all ranks."""
    model_flops: float
    """Floating-point operations of a step, of all ranks, as without recomputation."""
    flops_per_s: float
    hardware_flops_per_s: float
    """With what activation checkpointing computes again."""
    peak_flops_per_s: float | None
    """Of all ranks' GPUs together; None if one of them is not known."""
    precision: str
    """Of the inputs that the peak is for."""
    peak_memory_bytes: float
    """The most that a rank had of its device's memory, or of the node's on a CPU."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: operations that the model needs, as a share of the peak."""
        return self.flops_per_s / self.peak_flops_per_s if self.peak_flops_per_s and self.flops_per_s else None

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilisation, if some are computed again."""
        again = self.hardware_flops_per_s > self.flops_per_s
        return self.hardware_flops_per_s / self.peak_flops_per_s if self.peak_flops_per_s and again else None


def throughput_of(run: RunDir) -> Throughput | None:
    """None if no rank has noted a step, or its peak memory. From the ends of the files, however long these are."""
    files = rank_files(run)
    share = TAIL_BYTES if is_mine(run.root) else min(TAIL_BYTES, MOST_TAILS_OF_OTHERS // max(1, len(files)))
    found = [_pace(run, path, share) for path in files.values()]
    paces = [pace for pace in found if pace is not None]
    if not paces:
        return None

    def a_second(name: str) -> float:
        return sum(pace.sums.get(name, 0.0) / pace.duration_s for pace in paces)

    def a_step(name: str) -> float:
        return sum(pace.sums.get(name, 0.0) / pace.steps for pace in paces)

    peaks = [_number(pace.device.get("peak_flops")) for pace in paces]
    names = {str(pace.device.get("precision", "")) for pace in paces}
    plain = a_second("model_flops")
    return Throughput(
        steps=max(pace.steps for pace in paces),
        tokens_per_s=a_second("input_tokens"),
        model_flops=a_step("model_flops"),
        flops_per_s=plain,
        # Where nothing is computed again, a rank notes one of the two.
        hardware_flops_per_s=sum(
            pace.sums.get("hardware_flops", pace.sums.get("model_flops", 0.0)) / pace.duration_s for pace in paces
        ),
        peak_flops_per_s=sum(peaks) if all(peaks) and len(paces) == len(files) else None,
        precision=names.pop() if len(names) == 1 else "",
        peak_memory_bytes=max(pace.peak_memory_bytes for pace in paces),
    )


@dataclass(frozen=True)
class _Pace:
    """Of one rank: sums over its newest steps."""

    steps: int
    duration_s: float
    sums: dict[str, float]
    peak_memory_bytes: float
    device: dict[str, Any]


_SUMMED = ("input_tokens", "model_flops", "hardware_flops")


def _pace(run: RunDir, path: Path, most_bytes: int) -> _Pace | None:
    tail = whole_records(read_tail(path, most_bytes, within=run.root).splitlines()[-(most_bytes // BYTES_OF_A_LINE) :])
    steps = [record for record in tail if record.get("event") == "step" and _number(record.get("step_s")) > 0]
    newest = [record for record in steps if record.get("attempt") == steps[-1].get("attempt")]
    # The first step of an attempt warms up.
    began = any(record.get("event") == "resume" for record in tail)
    counted = newest[1:] if began and len(newest) > 1 else newest
    if not counted or "peak_memory_bytes" not in counted[-1]:
        return None
    sums = {name: sum(_number(record.get(name)) for record in counted) for name in _SUMMED if name in counted[-1]}
    memory = max(_number(record.get("peak_memory_bytes")) for record in newest)
    device = next((record for record in head_records(run, path, most_bytes) if record.get("event") == "device"), {})
    return _Pace(len(counted), sum(_number(record["step_s"]) for record in counted), sums, memory, device)


def _number(value: object) -> float:
    """A finite number that is not negative; 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    return float(value) if 0 <= value < _MOST else 0.0


def in_words(found: Throughput) -> str:
    """``12,300 tokens/s; 4.1 TFLOP/s, MFU 36% of the GPUs' bf16 peak; a rank's peak memory is 1.2 GB``."""
    parts = [f"{found.tokens_per_s:,.0f} tokens/s"] if found.tokens_per_s else []
    if found.flops_per_s:
        rate = f"{_scaled(found.flops_per_s)}FLOP/s ({_scaled(found.model_flops)}FLOP a step)"
        used = f", MFU {found.mfu:.1%} of the GPUs' {found.precision} peak" if found.mfu is not None else ""
        again = f", HFU {found.hfu:.1%} with what is computed again" if found.hfu is not None else ""
        parts.append(rate + used + again)
    parts.append(f"a rank's peak memory is {_scaled(found.peak_memory_bytes)}B")
    return "; ".join(parts)


def _scaled(value: float) -> str:
    for unit, many in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= many:
            return f"{value / many:.3g} {unit}"
    return f"{value:.3g} "
