"""How much a run gets through: time of a step, tokens and floating-point operations a second, bytes that the ranks
exchange, and memory, as the ranks noted them.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcmm.files import read_tail
from hpcmm.runs.metrics import (
    BYTES_OF_A_LINE,
    COMM_BYTES,
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
_AXIS = re.compile(re.escape(COMM_BYTES) + "([a-z_]{1,40})")
_MOST_AXES = 20


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
    step_s: float = 0.0
    """The median of the steps."""
    samples_per_s: float = 0.0
    """Of all ranks."""
    loss: float | None = None
    """Of the newest step that all ranks have noted, over the whole global batch."""
    comm_bytes: dict[str, float] = field(default_factory=dict)
    """Payload that a rank exchanges in a step, the mean over the ranks, by what its groups are for."""

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
        step_s=statistics.median(step_s for pace in paces for step_s in pace.steps_s),
        samples_per_s=a_second("samples"),
        loss=_loss(paces),
        comm_bytes=_mean_bytes(paces),
    )


def _loss(paces: Sequence[_Pace]) -> float | None:
    """Each token counts the same if the ranks tell how many they had; else each rank does."""
    steps = set.intersection(*(set(pace.losses) for pace in paces))
    if not steps:
        return None
    newest = [pace.losses[max(steps)] for pace in paces]
    weights = sum(weight for _, weight in newest)
    return sum(loss * weight for loss, weight in newest) / weights if weights else None


def _mean_bytes(paces: Sequence[_Pace]) -> dict[str, float]:
    names = sorted({name for pace in paces for name in pace.comm_bytes})[:_MOST_AXES]
    return {name: sum(pace.comm_bytes.get(name, 0.0) for pace in paces) / len(paces) for name in names}


@dataclass(frozen=True)
class _Pace:
    """Of one rank: sums over its newest steps."""

    steps: int
    duration_s: float
    sums: dict[str, float]
    peak_memory_bytes: float
    device: dict[str, Any]
    steps_s: list[float]
    losses: dict[int, tuple[float, float]]
    """By step the loss, and of how many tokens it is the mean; 1 if that is not noted."""
    comm_bytes: dict[str, float]
    """A step on average."""


_SUMMED = ("input_tokens", "samples", "model_flops", "hardware_flops")


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
    head = head_records(run, path, most_bytes)
    device = next((record for record in head if record.get("event") == "device"), {})
    usual = [record for record in counted if not _axes(record)] or counted  # to count the bytes takes time
    return _Pace(
        len(counted),
        sum(_number(record["step_s"]) for record in counted),
        sums,
        memory,
        device,
        [_number(record["step_s"]) for record in usual],
        dict(filter(None, map(_loss_of, newest))),
        _bytes_of([*head, *tail]),
    )


def _loss_of(record: dict[str, Any]) -> tuple[int, tuple[float, float]] | None:
    """The step, and what :attr:`_Pace.losses` has of it."""
    step, loss = record.get("step"), record.get("loss")
    if type(step) is not int or not isinstance(loss, float):
        return None
    return step, (loss, _number(record["tokens"]) if "tokens" in record else 1.0)


def _axes(record: dict[str, Any]) -> dict[str, float]:
    return {match[1]: _number(value) for name, value in record.items() if (match := _AXIS.fullmatch(name))}


def _bytes_of(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of a long run they are at the beginning of its file, of a short one also at its end."""
    steps = {str(record.get("unix_ns")): found for record in records if (found := _axes(record))}
    names = {name for found in steps.values() for name in found}
    return {name: sum(found.get(name, 0.0) for found in steps.values()) / len(steps) for name in names}


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
