"""What a step loses, to what, because of whom: the ranked table, every second of it counted once.

The time of a step, as a mean over ranks, is useful work, exposed transfer, and exposed waiting. Waiting and the excess
work that caused it are charged to (rank, part of its work) by :mod:`hpcmm.analysis.delay_costs`. A charge makes a
rank a straggler only if it stands out of the noise; the rest is one row that blames nobody. ``docs/bottlenecks.md``
explains the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import (
    delay_costs,
    experts,
    gpu_findings,
    gpu_trace,
    longer_work,
    network,
    parallelism,
    stalls,
    wait_chains,
)
from hpcmm.analysis.delay_costs import BETWEEN_STEPS, UNEXPLAINED, Floats, WorkParts
from hpcmm.analysis.findings import (
    CAUSES,
    FEW_STEPS,
    HIGH,
    LOW,
    MEDIUM,
    STRAGGLER_SHARE,
    AnalysisContext,
    Finding,
    computation_has_phases,
    doubted,
    gpu_doubt,
    kind_of_part,
    of_few_steps,
    phase_of_part,
    variation,
    within,
)
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.parallelism import Stages
from hpcmm.analysis.phases import StepTimes
from hpcmm.analysis.process_groups import Unseen, silent_ranks
from hpcmm.analysis.range_names import part_of_a_step
from hpcmm.analysis.statistics import chance_of_sum
from hpcmm.analysis.stragglers import (
    MAX_CHANCE,
    Mask,
    explain_by_batches,
    find_batch_imbalance,
    find_stragglers,
    least_loss_s,
)
from hpcmm.analysis.trace import ON_GPU, RankTrace
from hpcmm.runs.links import Network

MIN_SHARE = 0.02
"""Losses below this share of a step are not worth a row."""
BLAMED_WEIGHT = 6.0
"""A row that names a culprit goes before rows that name nobody with up to so many times its loss."""
COLUMNS = [
    "rank_order", "cause", "lost_s_per_step", "step_share", "rank", "node", "phase", "evidence", "confidence",
    "evidence_rows", "worst_step", "suggestion",
]  # fmt: skip


def gather(
    traces: Sequence[RankTrace],
    rows: pd.DataFrame,
    steps: StepTimes,
    expected_ranks: int,
    on_gpus: Mapping[str, pd.DataFrame] | None = None,
    links: Network | None = None,
) -> AnalysisContext:
    """Charge all waiting, in seconds a step. ``on_gpus`` holds the tables ``gpu``, ``idle`` and ``copies``."""
    parts = delay_costs.work_parts(traces)
    groups = wait_chains.charged_groups(rows, parts)
    losses = wait_chains.losses_by_step(groups, len(traces), parts, steps.numbers)
    # Of ranks whose communication was not recorded it is not known how long they wait: the mean is over the others.
    seen = 1.0 - len(silent_ranks(traces)) / max(len(traces), 1)
    total, own = losses.total / NS_PER_S / seen, losses.own / NS_PER_S / seen
    gpu, idle, copies = (pd.DataFrame() if on_gpus is None else on_gpus[name] for name in ("gpu", "idle", "copies"))
    known = Network() if links is None else links
    return AnalysisContext(traces, rows, steps, parts, groups, total, own, expected_ranks, gpu, idle, copies, known)


def find(context: AnalysisContext) -> list[Finding]:
    """All findings above :data:`MIN_SHARE` of a step, the most telling first; empty without steps.

    They are ordered by loss, where a loss that has a culprit counts :data:`BLAMED_WEIGHT` times: waiting and transfer
    are never nothing, and a culprit can be done something about.
    """
    if not len(context.steps.numbers):
        return []
    stages = parallelism.find_stages(context.rows, context.traces)
    in_pipeline = parallelism.pipeline_losses(context, stages)
    stopped, stopped_s = _stopped(context)
    broken = stalls.find_network_stalls(context, stopped_s)
    transfer = network.transfer(context, sum(finding.lost_s for finding in [*stopped, *broken]), stages)
    context = replace(context, losses=in_pipeline.losses)
    least_s = least_loss_s(context, sum(finding.lost_s for finding in transfer))
    alone, explained = stalls.solo_findings(context, least_s)
    alone += stalls.unseen_solo_findings(context, least_s)
    late, blamed = find_stragglers(context, least_s, explained)
    withheld_s, in_sends_s = longer_work.withheld_s(context), 0.0
    if not stages:  # whose ranks have different work
        longer = longer_work.find_longer_work(context, late, blamed)
        blamed, withheld_s = longer.blamed, max(0.0, withheld_s - longer.uncharged_s)
        unseen = longer_work.find_unseen_waiting(context)
        late = longer.findings + unseen
        transfer = network.without_waiting(transfer, sum(finding.lost_s for finding in unseen))
        in_sends_s = longer.in_sends_s
    moe = experts.expert_groups(context)
    late = [experts.explain_by_experts(context, explain_by_batches(context, finding), moe) for finding in late]
    late = doubted([_placed(context, finding, stages) for finding in late], _doubt_of_phases(context))
    own_work = _own_work(context)
    # That the GPUs starve meanwhile is seen in those steps alone that have their records.
    seen = gpu_trace.traced_share(context.gpu)
    accounted = [replace(finding, lost_s=finding.lost_s / seen) for finding in own_work]
    on_gpus = gpu_findings.in_steps(context.gpu, context.idle, context.copies, accounted)
    on_gpus = _without_launches(on_gpus, context.gpu, sum(finding.lost_s for finding in accounted))
    on_gpus = doubted([*gpu_findings.unmatched(context, [*alone, *late]), *on_gpus], gpu_doubt(context.traces))
    rest = [*_imbalance(context, blamed, moe, withheld_s), *transfer]
    rest = rest if stages else longer_work.explain_sends(context, rest, in_sends_s)
    findings = [
        *alone,
        *late,
        *in_pipeline.findings,
        *rest,
        *stopped,
        *broken,
        *own_work,
        *on_gpus,
    ]
    return _worth(within(of_few_steps(findings, context.steps), context.steps.period_s), context.steps.period_s)


def _doubt_of_phases(context: AnalysisContext) -> str:
    """Why the phases of GPUs' work are not compared between ranks; empty if they are."""
    lacking = delay_costs.lack_launches(context.traces)
    if not lacking or ON_GPU not in context.parts.names:
        return ""
    whose = "" if len(lacking) == len(context.traces) else f" on {', '.join(trace.name for trace in lacking[:5])}"
    return f"the calls that launched work of GPUs were not recorded{whose}, so that it is not told by phase"


def _without_launches(findings: Sequence[Finding], gpu: pd.DataFrame, accounted_s: float) -> list[Finding]:
    """``findings`` on GPUs that call nothing launched in time if no launch was traced.

    What the hosts do meanwhile, ``accounted_s``, is in other rows then.
    """
    idle = gpu[gpu["idle_other_s"] > 0] if len(gpu) else gpu
    if idle.empty or (idle["idle_other_cause"] != gpu_trace.UNTRACED).any():
        return list(findings)
    told = "GPUs are idle in {:.3g} s that no phase explains; nothing tells whether the host launched late"
    lost = [max(0.0, each.lost_s - accounted_s) for each in findings]
    return [
        each
        if each.kind != "gpu_order"
        else replace(each, kind="gpu_unknown", cause=CAUSES["gpu_unknown"], lost_s=left, evidence=told.format(left))
        for each, left in zip(findings, lost, strict=True)
    ]


_MOST_WAITING = 0.5
"""A group is named for a rank that others wait for if it has this share of that waiting."""


def _placed(context: AnalysisContext, finding: Finding, stages: Stages) -> Finding:
    """``finding`` with the rank's pipeline stage, and the group in which the others wait for it, as far as known."""
    if finding.rank is None:
        return finding
    told = finding.evidence
    trace = next(index for index, each in enumerate(context.traces) if each.rank == finding.rank)
    stage = next((number for number, members in enumerate(stages) if trace in members), None)
    told += "" if stage is None else f"; {context.traces[trace].name} is in pipeline stage {stage}"
    rows = context.rows
    waiting = rows[(rows["late_rank"] == finding.rank).fillna(False).astype(bool) & (rows["axis"] != "")]
    by_group = waiting.groupby(["axis", "group_ranks"])["exposed_wait_ns"].sum()
    if len(by_group) and by_group.max() > _MOST_WAITING * by_group.sum() > 0:
        at = by_group.reset_index().iloc[int(by_group.to_numpy(np.float64).argmax())]
        of = f" of ranks {at['group_ranks']}" if at["group_ranks"] else ""
        told += f"; they wait in the {at['axis']} group{of}"
    return replace(finding, evidence=told)


def find_without_steps(tables: Mapping[str, pd.DataFrame], unseen: Unseen, doubt: str = "") -> list[Finding]:
    """Findings of a capture without steps, from the tables of :func:`gpu_findings.of_capture`: all of it counts as one
    step.

    ``unseen``: ranks that collectives may wait for, although no report shows them. ``doubt``: why the records of GPUs
    are not to be trusted, if so.

    Nothing tells chance from a straggler there, so that a row with a culprit goes by its loss as any other. What is
    worth a row is measured by the capture without gaps that come once. GPUs that only set memory lost nothing.
    """
    gpu = tables["gpu"]
    if not (gpu[["compute_s", "comm_s"]].sum(axis=1) + gpu["memory_s"] > gpu["set_s"]).any():
        return []
    found = _without_launches(gpu_findings.of_capture(tables, unseen), gpu, 0.0)
    return _worth(doubted(found, doubt), gpu_findings.repeated_s(gpu, found), 1.0)


def _worth(findings: Sequence[Finding], step_s: float, weight: float = BLAMED_WEIGHT) -> list[Finding]:
    worth = [finding for finding in findings if finding.lost_s >= MIN_SHARE * step_s]
    weights = {id(finding): finding.lost_s * (weight if finding.blames else 1.0) for finding in worth}
    for everybodys in worth:
        # One rank that takes longer over what costs all of them even more is not the first thing to know.
        lesser = [one for one in worth if one.kind == everybodys.kind and one.blames and one.lost_s < everybodys.lost_s]
        if lesser and not everybodys.blames:
            weights[id(everybodys)] = max(weights[id(everybodys)], *(weights[id(one)] for one in lesser)) * _JUST_ABOVE
    return sorted(worth, key=lambda finding: -weights[id(finding)])


_JUST_ABOVE = 1.0 + 1e-9


def _stopped(context: AnalysisContext) -> tuple[list[Finding], Floats]:
    """Ranks whose process stood still in the middle of a collective, and what all such stalls cost in each step."""
    found = []
    total = np.zeros(len(context.steps.numbers))
    for index, lost in stalls.find_process_stalls(context.traces, context.steps, context.rows):
        trace, mean = context.traces[index], float(lost.mean())
        total += lost
        hit = context.steps.numbers[lost > 0]
        told = f"no thread of {trace.name} ran while all were in a collective, in {len(hit)} of {len(lost)} steps"
        share = mean / context.steps.mean_s
        sure = HIGH if share >= 2 * STRAGGLER_SHARE else MEDIUM
        worst = context.worst_step(lost)
        rows = f"collectives: step={worst} rank={trace.rank}"
        if share >= STRAGGLER_SHARE:
            found.append(Finding("stall", CAUSES["stall"], mean, trace.rank, trace.node, "", told, sure, rows, worst))
    return found, total


def _imbalance(
    context: AnalysisContext, blamed: Mask, moe: Sequence[experts.ExpertGroup], withheld_s: float
) -> list[Finding]:
    """Waiting that no straggler causes: because loads of experts or batches differ, or else ranks do, by turns.

    For whom the ranks wait for ``withheld_s`` of a step, the clocks do not tell.
    """
    rest = np.where(blamed, 0.0, context.losses)
    loads = experts.find_expert_imbalance(context, rest, moe, np.asarray(blamed.any(axis=(0, 2))))
    if loads is not None:
        compute = [index for index, name in enumerate(context.parts.names) if kind_of_part(name) == "compute"]
        rest[:, :, compute] *= 1.0 - loads.lost_s / float(rest[:, :, compute].sum(axis=(1, 2)).mean())
    uneven = find_batch_imbalance(context, rest, ~np.asarray(blamed.any(axis=(0, 2))))
    if uneven is not None:
        compute = [index for index, name in enumerate(context.parts.names) if kind_of_part(name) == "compute"]
        rest[:, :, compute] = 0.0
    lost = float(rest.sum(axis=(1, 2)).mean()) + withheld_s
    by_part = rest.sum(axis=(0, 1))
    part = (*context.parts.names, UNEXPLAINED)[int(by_part.argmax())]
    phase = "" if part == UNEXPLAINED else phase_of_part(part)
    told = f"ranks wait for one another{_most_often(context, rest, blamed)}; {variation(context.steps)}"
    if withheld_s > MIN_SHARE * context.steps.mean_s:
        error_s = float(context.rows["clock_error_ns"].max()) / NS_PER_S
        told += (
            f"; for whom they wait {withheld_s:.3g} s of it is not known, as the clocks agree within {error_s:.3g} s "
            "only; ranks that leave slow collectives one after the other look like it"
        )
    worst = context.worst_step(rest[:, :, int(by_part.argmax())].sum(axis=1))
    rows = f"delays: phase={part}" + ("" if worst is None else f" step={worst}")
    kind = "few" if len(context.steps.numbers) < FEW_STEPS else "imbalance"
    other = Finding(kind, CAUSES[kind], lost, None, "", phase, told, LOW, rows, worst)
    return [each for each in (loads, uneven, other) if each is not None]


def _most_often(context: AnalysisContext, rest: Floats, blamed: Mask) -> str:
    """For whom of those that are not blamed, and why that one is not; ``rest`` is what is not blamed on anybody."""
    free = np.flatnonzero(~blamed.any(axis=(0, 2)))
    delays = rest.sum(axis=2)[:, free]
    if delays.shape[1] < 2 or not delays.any():
        return ""
    late = delays.max(axis=1) > 0
    counts = np.bincount(delays.argmax(axis=1)[late], minlength=delays.shape[1])
    most = int(counts.argmax())
    told = f", most often for {context.who(free[[most]].tolist())}, in {counts[most]} of {len(delays)} steps"
    if chance_of_sum(delays, most) > MAX_CHANCE:
        return f"{told}, which chance can explain"
    return f"{told}, but in no kind of work by so much that it is named"


def _own_work(context: AnalysisContext) -> list[Finding]:
    """Time that all ranks spend on something other than training: loading, checkpoints, child processes, gaps."""
    found = []
    known = computation_has_phases(context.traces)
    # The host may load or save while its GPU computes.
    costly = context.parts.starving(context.traces)
    work = context.work_by_step()
    per_step = _work_per_step(context, costly)
    for part, name in enumerate(costly.names):
        phase, kind = phase_of_part(name), kind_of_part(name)
        by_step = np.median(work[:, :, context.parts.names.index(name)], axis=1)
        at = _rare(by_step)
        is_of_each_step = kind == "compute" and (part_of_a_step(phase) != "" or not len(at))
        if is_of_each_step or (kind == "other" and not known):
            continue
        seconds = per_step[:, part]
        # What late ranks spent longer is in their rows, or in that of the imbalance. Excess for which nobody waited is
        # in none, and no loss of all ranks, either: the lower median does not see it.
        charged = float(context.own_losses[:, :, part].sum(axis=1).mean())
        lost = max(0.0, min(float(np.sort(seconds)[(len(seconds) - 1) // 2]), float(seconds.mean()) - charged))
        told = f"the ranks alike spend {lost:.3g} s a step in it"
        told += " while its GPU has nothing to do" if len(context.gpu) else ""
        told += context.calls_within(phase) if kind == "data" else ""
        cause = f"{phase if kind == 'compute' else CAUSES[kind]} on all ranks"
        if len(at):
            told += _told_of_rare(context, by_step, at, phase)
            kind = "between" if kind in {"compute", "other"} else kind  # logging or evaluation, wherever the steps end
        worst = context.worst_step(by_step)
        found.append(Finding(kind, cause, lost, None, "", phase, told, MEDIUM, f"phases: phase={phase}", worst))
    return found


RARE_STEPS, RARE_SHARE = 0.2, 0.8
"""Work is rare if so few of the steps have so much of it: an evaluation on all ranks, as at the end of an epoch."""


def _rare(by_step: Floats) -> npt.NDArray[np.intp]:
    """Positions of the steps that have almost all of it; empty if it is spread over more of them."""
    long = by_step > by_step.max(initial=0.0) / 3
    few = long.sum() <= RARE_STEPS * len(by_step)
    return np.flatnonzero(long) if few and by_step[long].sum() > RARE_SHARE * by_step.sum() else np.empty(0, np.intp)


def _told_of_rare(context: AnalysisContext, by_step: Floats, at: npt.NDArray[np.intp], phase: str) -> str:
    numbers = ", ".join(map(str, context.steps.numbers[at][:5].tolist())) + (", ..." if len(at) > 5 else "")
    where = f"{'before' if phase == BETWEEN_STEPS else 'in'} step{'s' if len(at) > 1 else ''} {numbers}"
    each = f"{float(np.median(by_step[at])):.3g} s{' each time' if len(at) > 1 else ''}"
    share = 100 * float(by_step[at].sum()) / float(by_step.sum())
    return f", {share:.0f}% of it {where}: {each}"


def _work_per_step(context: AnalysisContext, parts: WorkParts) -> Floats:
    """Mean seconds a (non-warm-up) step that a trace has in each of ``parts``, shape (traces, parts)."""
    totals = np.zeros((len(context.traces), len(parts.names)))
    between = parts.names.index(BETWEEN_STEPS)
    for trace, rank in enumerate(context.traces):
        steps = rank.steps[rank.steps["step"].isin(context.steps.numbers)]
        start, end = steps["start_ns"].to_numpy(np.float64), steps["end_ns"].to_numpy(np.float64)
        if len(steps):
            totals[trace] = parts.between(trace, start, end).sum(axis=0)
            totals[trace, between] = parts.between(trace, start[:1], end[-1:])[0, between]
            totals[trace] /= NS_PER_S * len(steps)
    return totals


def table(findings: Sequence[Finding], period_s: float, suggestions: Sequence[str]) -> pd.DataFrame:
    """The ranked table (COLUMNS), one row a finding, whose share is of ``period_s``."""
    frame = pd.DataFrame(
        [
            (
                order,
                finding.cause,
                finding.lost_s,
                finding.lost_s / period_s if period_s > 0 else 0.0,
                finding.rank,
                finding.node,
                finding.phase,
                finding.evidence,
                finding.confidence,
                finding.rows,
                finding.worst_step,
                suggestion,
            )
            for order, (finding, suggestion) in enumerate(zip(findings, suggestions, strict=True), start=1)
        ],
        columns=COLUMNS,
    )
    return frame.astype({"rank": "Int64", "worst_step": "Int64"})
