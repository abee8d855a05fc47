"""How a run is parallel: what each process group is for, which ranks are a pipeline stage, and which stage is heavier.

The ranks may tell it (:mod:`hpcmm.analysis.process_groups`). Else sends and receives connect the stages of a pipeline,
and where a group's bytes flow, by operation and phase, tells gradients, sharded parameters and activations apart. A
group is given a name only if the data tell one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis import process_groups
from hpcmm.analysis.collectives import POINT_TO_POINT, SMALL_BYTES
from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.findings import CAUSES, HIGH, LOW, MEDIUM, AnalysisContext, Finding, kind_of_part
from hpcmm.analysis.gpu_trace import traced
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.nccl import without_size
from hpcmm.analysis.range_names import part_of_a_step
from hpcmm.analysis.trace import NO_PEER, NO_SIZE, OTHER, RankTrace
from hpcmm.annotate.schema import REPLICAS

GRADIENTS, PARAMETERS, ACTIVATIONS, TOKENS, SENDS, BUFFERS, SMALL, UNKNOWN = (
    "gradients",
    "sharded parameters",
    "activations",
    "tokens of experts or sequence parts",
    "pipeline sends",
    "module buffers",
    "small messages",
    "",
)
"""What moves."""
EXPERT_TOKENS, SEQUENCE_PARTS = "tokens of experts", "sequence parts"
"""The same, if the ranks tell which of the two."""
_CARRIES = {
    "tensor": ACTIVATIONS,
    "sequence": SEQUENCE_PARTS,
    "expert": EXPERT_TOKENS,
    "pipeline": SENDS,
    REPLICAS: GRADIENTS,
}
"""What the groups along an axis exchange; those of the data axis gradients or parameters."""
_AXES = {GRADIENTS: "data", PARAMETERS: "data", ACTIVATIONS: "tensor", EXPERT_TOKENS: "expert", SENDS: "pipeline"}
BULK = 0.1
"""A group is for what takes this share of its bytes."""
OFTEN = 0.5
"""So many reductions for each gather are as many: tensor-parallel layers have one of each."""
REDUCES = ("all_reduce", "reduce_scatter")

Stages = tuple[tuple[int, ...], ...]
"""Traces of each pipeline stage, in the order of the stages; empty without a pipeline."""


def find_stages(rows: pd.DataFrame, traces: Sequence[RankTrace]) -> Stages:
    """The stages that the ranks tell of, or else those that sends and receives connect.

    In a pipeline exactly one rank of each chain begins a step by sending, the first stage; a ring exchange of equal
    parts does not look like that, or its ends also share out their gradients.
    """
    if told := process_groups.stages(traces):
        return told
    sends = rows[_pipeline_sends(rows) & (rows["step"] >= 0)] if len(rows) else rows
    if sends.empty:
        return ()
    if (sends["peer"] == NO_PEER).any():
        return _stages_of_groups(rows, sends, len(traces))
    of_rank = {trace.rank: index for index, trace in enumerate(traces)}
    chains = _chains(sends, of_rank)
    begins = _begins_by_sending(sends)
    ordered = []
    for chain in chains:
        first = [trace for trace in chain if begins.get(trace, False)]
        if len(first) != 1 or first[0] not in {chain[0], chain[-1]} or _share_more_than_they_send(rows, sends, chain):
            return ()
        ordered.append(chain if first[0] == chain[0] else chain[::-1])
    if len({len(chain) for chain in ordered}) != 1 or len(ordered[0]) < 2:
        return ()
    return tuple(tuple(sorted(stage)) for stage in zip(*ordered, strict=True))


def _pipeline_sends(rows: pd.DataFrame) -> pd.Series[bool]:
    """Sends and receives between stages, and not those within a group for something else, such as a ring."""
    return rows["op"].isin(POINT_TO_POINT) & rows["axis"].isin(["", "pipeline"])


def _chains(sends: pd.DataFrame, of_rank: dict[int, int]) -> list[list[int]]:
    """Traces that sends connect, each in the order of ranks."""
    chain = {index: {index} for index in sends["trace"].unique().tolist()}
    for trace, peer in sends[["trace", "peer"]].drop_duplicates().itertuples(index=False):
        other = of_rank.get(int(peer))
        if other is not None and other in chain and chain[other] is not chain[int(trace)]:
            chain[int(trace)] |= chain[other]
            for member in chain[int(trace)]:
                chain[member] = chain[int(trace)]
    rank_of = {index: rank for rank, index in of_rank.items()}
    return [
        sorted(members, key=rank_of.__getitem__) for members in {id(each): each for each in chain.values()}.values()
    ]


def _begins_by_sending(sends: pd.DataFrame) -> dict[int, bool]:
    """For each trace, whether most of its steps begin with a send."""
    first = sends.sort_values("start_ns", kind="stable").drop_duplicates(["trace", "step"])
    share = (first["op"] == "send").groupby(first["trace"]).mean()
    return {int(str(trace)): bool(value > 0.5) for trace, value in share.items()}


def _share_more_than_they_send(rows: pd.DataFrame, sends: pd.DataFrame, chain: Sequence[int]) -> bool:
    """Whether all of ``chain`` take part in collectives of more bytes than they send one another."""
    own = rows[(rows["step"] >= 0) & rows["trace"].isin(chain) & ~rows["op"].isin(POINT_TO_POINT)]
    members = own.groupby("group")["trace"].nunique()
    shared = own[own["group"].map(members) == len(chain)]
    return bool(shared["bytes"].sum() > sends.loc[sends["trace"].isin(chain), "bytes"].sum())


def _stages_of_groups(rows: pd.DataFrame, sends: pd.DataFrame, traces: int) -> Stages:
    """Stages of reports whose sends do not say to whom: the groups in which ranks reduce their gradients."""
    reduces = rows[rows["complete"].astype(bool) & rows["op"].isin(REDUCES)]
    reduces = reduces[(reduces["ranks"] > 1) & (reduces["ranks"] < traces) & (reduces["step"] >= 0)]
    by_bytes = reduces.groupby("group")["bytes"].sum().sort_values(ascending=False)
    stages: list[tuple[int, ...]] = []
    for group in by_bytes.index:
        members = tuple(sorted(reduces.loc[reduces["group"] == group, "trace"].unique().tolist()))
        if not set(members) & {trace for stage in stages for trace in stage}:
            stages.append(members)
    whole = sorted(trace for stage in stages for trace in stage) == list(range(traces))
    alike = len({len(stage) for stage in stages}) == 1
    everyone = sends["trace"].nunique() == traces
    return tuple(sorted(stages)) if whole and alike and everyone and len(stages) > 1 else ()


def what_moves(rows: pd.DataFrame, stages: Stages) -> npt.NDArray[np.object_]:
    """For each of ``rows``, what it carries: one of the names above."""
    found = np.full(len(rows), UNKNOWN, dtype=object)
    op, sizeless = rows["op"].to_numpy(str), without_size(rows)
    small = (rows["bytes"] < SMALL_BYTES).to_numpy(bool) & ~sizeless
    # Of a model without larger messages these are the gradients; beside larger ones, such as statistics of batches.
    part = _parts_of_steps(rows)
    tiny = np.isin(op, REDUCES) & (part == "backward")
    for at in rows.reset_index(drop=True).groupby("group").indices.values():
        found[at] = _group_moves(rows.iloc[at], stages)
        found[at[small[at]]] = SMALL
        if (small | sizeless)[at].all():
            found[at[tiny[at]]] = GRADIENTS
    told = rows["axis_basis"].to_numpy(str) == process_groups.TOLD
    found[np.isin(op, ["all_to_all"]) & ~small & ~told] = TOKENS
    uneven = rows["group"].isin(rows.loc[rows["received"] != NO_SIZE, "group"]).to_numpy(bool)
    found[(found == TOKENS) & uneven] = EXPERT_TOKENS
    found[np.isin(op, ["broadcast"]) & ~small & (part == "forward")] = BUFFERS
    found[_pipeline_sends(rows).to_numpy(bool)] = SENDS if stages else UNKNOWN
    return found


def _parts_of_steps(rows: pd.DataFrame) -> npt.NDArray[np.object_]:
    """Which of hpcmm's own phases the phase of each row is, whatever the program calls it."""
    return np.array([part_of_a_step(str(phase)) for phase in rows["phase"]], dtype=object)


def with_axes(rows: pd.DataFrame, traces: Sequence[RankTrace]) -> pd.DataFrame:
    """``rows`` with the axes of groups that no rank tells of, if the bulk of their bytes does."""
    missing = rows[(rows["axis"] == "") & (rows["ranks"] > 1)] if len(rows) else rows
    if missing.empty:
        return rows
    stages = find_stages(rows, traces)
    seen = {}
    for group, of_group in missing.groupby("group"):
        moves = pd.Series(what_moves(of_group, stages))
        most = of_group["bytes"].reset_index(drop=True).groupby(moves).sum().idxmax()
        seen[str(group)] = _AXES.get(str(most), "")
    axis = rows["axis"].where(rows["axis"] != "", rows["group"].map(seen).fillna(""))
    seen_now = (axis != "") & (rows["axis"] == "")
    return rows.assign(axis=axis, axis_basis=rows["axis_basis"].where(~seen_now, process_groups.SEEN))


def _group_moves(rows: pd.DataFrame, stages: Stages) -> str:
    """What the bulk of one group's bytes is."""
    axis = str(rows["axis"].iloc[0])
    if axis in _CARRIES:
        return _CARRIES[axis]
    found = _moves_by_phase(rows, stages)
    return found if "data" not in axis.split() or found == PARAMETERS else GRADIENTS


def _moves_by_phase(rows: pd.DataFrame, stages: Stages) -> str:
    """The same, of a group that the ranks tell nothing of, or that is for the data axis.

    Activations are exchanged within the forward pass, and reduced there too; one gather there, such as of the logits,
    may be larger than all else. Sharded parameters are gathered in forward or backward, and only their gradients are
    reduced, in backward. Gradients alone are reduced in backward or later, and a sharded optimizer then gathers what it
    has updated.
    """
    bulk = rows[~rows["op"].isin(POINT_TO_POINT) & (rows["bytes"] >= SMALL_BYTES)]
    whole = float(bulk["bytes"].sum())
    if not whole:
        return UNKNOWN
    part = pd.Series(_parts_of_steps(bulk), index=bulk.index)
    forward, backward = part == "forward", part == "backward"
    reduces, gathers = bulk["op"].isin(REDUCES), bulk["op"] == "all_gather"

    def much(chosen: pd.Series[bool]) -> bool:
        return float(bulk.loc[chosen, "bytes"].sum()) >= BULK * whole

    members = set(rows["trace"].unique().tolist())
    in_stage = any(members <= set(stage) for stage in stages)
    # Without phases: who gathers more than is reduced gathers for forward and backward.
    scatters = float(bulk.loc[bulk["op"] == "reduce_scatter", "bytes"].sum())
    gathered = float(bulk.loc[gathers, "bytes"].sum())
    # FSDP gathers its outermost unit before the forward pass begins; a sharded optimizer gathers in its own phase.
    before = (bulk["phase"] == OTHER) & much(backward & reduces) & (scatters > 0)
    is_reduced_as_often = int((forward & reduces).sum()) > OFTEN * int((forward & gathers).sum())
    told = [
        (ACTIVATIONS, much(forward & reduces) or is_reduced_as_often),
        (PARAMETERS, much((forward | backward | before) & gathers)),
        (GRADIENTS, much(reduces & (backward | (part == "optimizer"))) or (in_stage and much(reduces))),
        (PARAMETERS, 0 < 1.2 * scatters < gathered),
        (GRADIENTS, scatters > 0),
    ]
    return next((name for name, fits in told if fits), UNKNOWN)


def group_name(rows: pd.DataFrame, moves: str, traces: Sequence[RankTrace]) -> str:
    """The groups of ``rows`` in words, such as ``tensor-parallel groups of 2 ranks within a node``."""
    kinds = {
        GRADIENTS: "data-parallel ",
        PARAMETERS: "sharded data-parallel ",
        ACTIVATIONS: "tensor-parallel ",
        TOKENS: "expert- or sequence-parallel ",
        EXPERT_TOKENS: "expert-parallel ",
    }
    told = set(rows["axis"]) if (rows["axis_basis"] == process_groups.TOLD).all() else set()
    kind = f"{told.pop()} " if len(told) == 1 else kinds.get(moves, "")
    members = [tuple(sorted(of_group["trace"].unique().tolist())) for _, of_group in rows.groupby("group")]
    several = sorted({each for each in members if len(each) > 1})
    if not several:
        return ""
    nodes = max(len({traces[index].node for index in each}) for each in several)
    where = "within a node" if nodes == 1 else f"across {nodes} nodes"
    if len(several) == 1:
        ranks = ", ".join(str(traces[index].rank) for index in several[0])
        who = f"all {len(traces)} ranks" if len(several[0]) == len(traces) else f"ranks {ranks}"
        return f"{kind}group of {who} {where}"
    sizes = sorted({len(each) for each in several})
    return f"{kind}groups of {' or '.join(map(str, sizes))} ranks {where}"


LEAST_SHARE = 0.03
"""A stage is heavier by at least this share of a step ..."""
LEAST_ERRORS = 4.0
"""... and by so many standard errors of the mean over the steps."""

TIMES_PEERS = 2.0
"""A rank has losses of its own if they are so many times those of the other ranks of its stage, ..."""
OWN_SHARE = 0.1
"""... and exceed that by this share of a step ..."""
MOSTLY = 0.5
"""... in the step, or in most of the steps."""


@dataclass(frozen=True, slots=True)
class PipelineLosses:
    """What a pipeline loses, and what is left for other causes."""

    findings: tuple[Finding, ...]
    losses: Floats
    """Of the context, without what is the stages' doing: shape (steps, traces, parts + 1)."""


def pipeline_losses(context: AnalysisContext, stages: Stages) -> PipelineLosses:
    """The heavier stage, the one that loads data, and the bubble. Ranks are compared only with those of their own stage
    from then on."""
    if not stages:
        return PipelineLosses((), context.losses)
    rest, taken = _without_stages(context, stages)
    rows = context.rows
    inside = rows[_pipeline_sends(rows) & rows["step"].isin(context.steps.numbers)]
    count = len(context.steps.numbers) * len(context.traces)
    # Sends that do not say to whom they go do not tell waiting from transfer, either.
    unknown = inside["exposed_transfer_ns"].where(inside["peer"] == NO_PEER, 0.0)
    waiting = float((inside["exposed_wait_ns"] + unknown).sum()) / NS_PER_S / count + taken
    heavier, loading = _heavier(context, stages), _loading(context, stages)
    # While one stage loads, the others wait.
    waiting -= sum(finding.lost_s for finding in heavier)
    waiting -= sum(finding.lost_s for finding in loading) * (1 - 1 / len(stages))
    bubble = _bubble(context, stages, inside, max(0.0, waiting))
    return PipelineLosses((*heavier, *loading, bubble), rest)


def _without_stages(context: AnalysisContext, stages: Stages) -> tuple[Floats, float]:
    """Losses beyond what all ranks of a stage have in common, and what they have, in seconds a step."""
    rest = context.losses.copy()
    work = context.work_by_step().sum(axis=2)
    for stage in stages:
        own = rest[:, stage]
        if len(stage) == 1:
            # Nobody to compare with: what is there in the usual step is the stage's.
            rest[:, stage] = np.maximum(own - np.median(own, axis=0, keepdims=True), 0.0)
            continue
        by_step = own.sum(axis=2)
        peers = np.column_stack([np.median(np.delete(by_step, place, axis=1), axis=1) for place in range(len(stage))])
        # Only what is far from the peers of the same stage is a rank's own, in a step or over all of them.
        apart = by_step > TIMES_PEERS * peers + OWN_SHARE * context.steps.median_s
        always = (by_step.mean(axis=0) > TIMES_PEERS * peers.mean(axis=0)) & (apart.mean(axis=0) > MOSTLY)
        # A rank may be late at its own group because it waited for another stage: only longer work is its own.
        busy = work[:, stage]
        usual = np.column_stack([np.median(np.delete(busy, place, axis=1), axis=1) for place in range(len(stage))])
        longer = np.maximum(busy - usual, 0.0)
        share = np.divide(longer, by_step, out=np.zeros_like(longer), where=by_step > 0).clip(0.0, 1.0)
        rest[:, stage] = own * ((apart | always) * share)[:, :, None]
    return rest, float((context.losses - rest).sum(axis=(1, 2)).mean())


def _work(context: AnalysisContext) -> Floats:
    """Seconds of computation of each trace in each step: of its GPUs if all were traced, else of the step thread.

    Loading and saving is no work of layers, so that it cannot move to another stage.
    """
    numbers = context.steps.numbers
    if len(context.gpu):
        table = context.gpu[context.gpu["step"].notna() & traced(context.gpu)]
        wide = table.pivot_table(index="step", columns="rank", values="compute_s", aggfunc="sum")
        wide = wide.reindex(index=numbers, columns=[trace.rank for trace in context.traces])
        if np.isfinite(wide.to_numpy(np.float64)).all():
            return wide.to_numpy(np.float64)
    return context.time_in([name for name in context.parts.names if kind_of_part(name) in {"compute", "other"}])


def _by_stage(times: Floats, stages: Stages) -> Floats:
    """``times`` of each trace in each step as those of the stages, shape (steps, stages).

    A single slow rank does not make its stage a heavy one: its least busy ranks tell.
    """
    return np.column_stack([np.sort(times[:, stage], axis=1)[:, (len(stage) - 1) // 2] for stage in stages])


def _ahead(context: AnalysisContext, by_stage: Floats) -> tuple[int, Floats] | None:
    """The stage that has most, and by how much more than the mean of the others in each step; None if chance may do."""
    most = int(by_stage.mean(axis=0).argmax())
    ahead = by_stage[:, most] - np.delete(by_stage, most, axis=1).mean(axis=1)
    error = float(ahead.std(ddof=1)) / np.sqrt(len(ahead)) if len(ahead) > 1 else np.inf
    least = max(LEAST_SHARE * context.steps.mean_s, LEAST_ERRORS * error)
    return (most, ahead) if float(ahead.mean()) >= least else None


def _loading(context: AnalysisContext, stages: Stages) -> list[Finding]:
    """Data loading of one stage, most often the first one."""
    loads = context.time_in([name for name in context.parts.names if kind_of_part(name) == "data"])
    if (found := _ahead(context, _by_stage(loads, stages))) is None:
        return []
    most, ahead = found
    ranks, lost = context.ranks(stages[most]), float(ahead.mean())
    told = f"stage {most} (ranks {ranks}) loads data for {lost:.3g} s a step, and the others wait for it"
    cause = f"{CAUSES['data']} of pipeline stage {most}"
    rows, worst = f"phases_summary: rank={ranks.split(',')[0]} phase=data", context.worst_step(np.maximum(ahead, 0.0))
    return [Finding("data", cause, lost, None, "", "data", told, MEDIUM, rows, worst, several=True)]


def _heavier(context: AnalysisContext, stages: Stages) -> list[Finding]:
    by_stage = _by_stage(_work(context), stages)
    mean = by_stage.mean(axis=0)
    if (found := _ahead(context, by_stage)) is None:
        return []
    most, ahead = found
    more = float(ahead.mean())
    least = min(range(len(stages)), key=lambda index: float(mean[index]))
    than = f"stage {least}" if len(stages) == 2 else "the others"
    ranks = context.ranks(stages[most])
    told = "; ".join(
        f"stage {index} (ranks {context.ranks(stage)}) works {mean[index]:.3g} s a step"
        for index, stage in enumerate(stages)
    )
    nodes = {context.traces[index].node for index in stages[most]}
    elsewhere = {context.traces[index].node for stage in stages if stage is not stages[most] for index in stage}
    alone = not nodes & elsewhere
    if alone:
        told += f"; {' and '.join(sorted(nodes))} runs this stage alone: if its layers cost no more, the node is slow"
    lost = float(mean[most] - mean.mean())
    worst = context.worst_step(np.maximum(ahead, 0.0))
    share = more / 2 / max(float(mean[most]), 1e-9)
    return [
        Finding(
            kind="stage",
            cause=f"pipeline stage {most} is heavier than {than} by {_duration(more)} a step",
            lost_s=lost,
            rank=None,
            node="",
            phase="",
            evidence=told,
            confidence=HIGH if not (alone and len(stages[most]) == 1) else MEDIUM,
            rows=f"phases_summary: rank={ranks.split(',')[0]}",
            worst_step=worst,
            several=True,
            moves=f"move about {share:.0%} of the work of stage {most} to {than.replace('the others', 'other stages')}",
        )
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _bubble(context: AnalysisContext, stages: Stages, sends: pd.DataFrame, lost_s: float) -> Finding:
    last = stages[-1][0]
    receives = sends[(sends["trace"] == last) & (sends["op"] == "recv")]
    # Beside its activations a micro-batch may send their shape, and labels, which are smaller.
    received = receives[receives["bytes"] >= BULK * receives["bytes"].max()].groupby("step").size()
    batches = float(received.median()) if len(received) else 0.0
    told = f"ranks of {len(stages)} pipeline stages wait for the stage before or after theirs"
    if batches >= 1:
        idle = (len(stages) - 1) / (batches + len(stages) - 1)
        told += f"; the last stage receives {batches:.0f} times a step: as many micro-batches leave {idle:.0%} idle"
        told += f" at best, and {lost_s / context.steps.mean_s:.0%} of a step were measured"
    waits = sends.groupby("step")["exposed_wait_ns"].sum().reindex(context.steps.numbers).fillna(0.0)
    worst = context.worst_step(waits.to_numpy(np.float64))
    rows = f"collectives: op=recv rank={context.traces[last].rank}" + ("" if worst is None else f" step={worst}")
    known = bool(len(sends)) and not (sends["peer"] == NO_PEER).any()
    if not known:
        told += "; part of it is the transfer, since no range tells to whom a send goes"
    return Finding("bubble", "pipeline bubble", lost_s, None, "", "", told, MEDIUM if known else LOW, rows, worst)


def without_bubble(rows: pd.DataFrame, stages: Stages) -> pd.DataFrame:
    """``rows`` without the sends whose time the bubble's row holds."""
    if not stages:
        return rows
    return rows[~(_pipeline_sends(rows) & (rows["peer"] == NO_PEER))]
