"""Is a rank slow, or are its batches longer? Computation that follows the batch is nobody's fault but the sampler's.

The size of each batch is known where the training code gave it to :func:`hpcmm.annotate.phase`. Without sizes, forward
and backward that are long together, on ranks that change from step to step, tell of unequal batches.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.findings import CAUSES, HIGH, MEDIUM, AnalysisContext, Finding, kind_of_part

LONGER = 1.1
"""A rank's batches are longer from so many times its peers' on."""
VARIED = 0.05
"""Batches differ from this standard deviation on, as a share of their mean."""
FOLLOWS = 0.5
"""Correlation of size and computation from which the one is taken for the other's cause."""
TOGETHER = 0.7
"""Correlation of forward and backward that stands for unequal batches where no sizes are known."""
MIN_CELLS = 16


def explain_by_batches(context: AnalysisContext, fault: Finding) -> Finding:
    """``fault`` as one of its batches, where those are so much longer than its peers'; else as it is."""
    sizes = _sizes(context)
    if fault.kind != "compute" or sizes is None:
        return fault
    mean = np.nanmean(sizes, axis=0)
    mine = np.array(
        [trace.rank == fault.rank if fault.rank is not None else trace.node == fault.node for trace in context.traces]
    )
    if mine.all() or not mine.any():
        return fault
    times = float(mean[mine].mean() / np.median(mean[~mine]))
    if not times > LONGER:
        return fault
    told = f"{fault.evidence}; its batches are {times:.3g} times as large as its peers'"
    on_node = "" if fault.rank is not None else " on a node"
    return replace(fault, kind="batch", cause=CAUSES["batch"] + on_node, evidence=told)


def find_batch_imbalance(context: AnalysisContext, losses: Floats, among: npt.NDArray[np.bool_]) -> Finding | None:
    """The loss in computation that comes of unequal batches; None where they are equal, or do not explain it.

    ``losses`` (steps, traces, parts + 1) are those that are nobody's fault; ``among`` (traces,) says who is not blamed.
    """
    forward, backward = context.time_in(["forward"])[:, among], context.time_in(["backward"])[:, among]
    if forward.shape[1] < 2 or forward.size < MIN_CELLS:
        return None
    sizes = _sizes(context)
    if sizes is not None:
        sizes = sizes[:, among]
    if sizes is not None and np.isfinite(sizes).all():
        if sizes.std() < VARIED * sizes.mean():
            return None
        strength = _correlation(_within_steps(sizes), _within_steps(forward + backward))
        if strength < FOLLOWS:
            return None
        told = (
            f"batches differ by {sizes.std() / sizes.mean():.0%} (standard deviation over mean) and computation "
            f"follows them (correlation {strength:.2f})"
        )
        confidence = HIGH if strength > 0.8 else MEDIUM
    else:
        # A rank that is always slow is not meant, so its own mean goes, too.
        here, there = (values - values.mean(axis=0) for values in (_within_steps(forward), _within_steps(backward)))
        strength = _correlation(here, there)
        if strength < TOGETHER or here.std() < 2 * VARIED * forward.mean():
            return None
        told = f"forward and backward are long together (correlation {strength:.2f}), by turns on any rank"
        confidence = MEDIUM
    compute = [index for index, name in enumerate(context.parts.names) if kind_of_part(name) == "compute"]
    by_part = losses[:, :, compute].sum(axis=(0, 1))
    by_step = losses[:, :, compute].sum(axis=(1, 2))
    phase = context.parts.names[compute[int(by_part.argmax())]]
    worst = context.worst_step(losses[:, :, compute[int(by_part.argmax())]].sum(axis=1))
    rows = f"delays: phase={phase}" + ("" if worst is None else f" step={worst}")
    return Finding("uneven", CAUSES["uneven"], float(by_step.mean()), None, "", phase, told, confidence, rows, worst)


def _sizes(context: AnalysisContext) -> Floats | None:
    """Size of each rank's batch in each step, shape (steps, traces); None where any rank has none."""
    columns = []
    for trace in context.traces:
        if trace.batches is None or trace.batches.empty:
            return None
        by_step = trace.batches.groupby("step")["size"].sum().reindex(context.steps.numbers)
        columns.append(by_step.to_numpy(np.float64))
    sizes = np.column_stack(columns)
    return sizes if np.isfinite(sizes).any(axis=0).all() else None


def _within_steps(values: Floats) -> Floats:
    """Deviation of each rank from the mean of its step."""
    deviation: Floats = values - values.mean(axis=1, keepdims=True)
    return deviation


def _correlation(left: Floats, right: Floats) -> float:
    spread = float(left.std() * right.std())
    return float((left * right).mean() / spread) if spread > 0 else 0.0
