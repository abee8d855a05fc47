"""What the GPUs lose besides late ranks and transfer: idle time by cause, copies, and whom collectives wait for.

In steps, a time that is idle or copying on more than half of the devices is everybody's; what one device has more of
than its peers is why its rank is late, and is charged there. Without steps the whole capture is taken for one, and
waiting in collectives, which nothing else tells of then, gets a row as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hpcmm.analysis import copies, idle, network
from hpcmm.analysis.findings import CAUSES, LOW, MEDIUM, STRAGGLER_SHARE, AnalysisContext, Finding
from hpcmm.analysis.gpu_trace import counted
from hpcmm.analysis.intervals import NS_PER_S
from hpcmm.analysis.nccl import kernel_op, waits_for_all
from hpcmm.analysis.process_groups import Unseen
from hpcmm.reports.report import CUDA_CALL, MPI, SYNCHRONISING

EVERYBODY = Unseen(0, 0)
ONE_IS_LATE = 2 / 3
"""A device is named for the waiting of the others when it comes last in so much of it."""
_OF_HOST = {
    "gpu_data": "idle while the host loads data",
    "gpu_os": "idle while the host is in calls into the OS",
    "gpu_code": "idle in long gaps while the host runs code of its own",
    "gpu_mpi": "idle while the host is in MPI",
    "gpu_cuda": "idle while the host is in long CUDA calls that wait for nothing",
    "gpu_host": "idle until the host has launched more",
    "gpu_sync": "idle while the host is in a call that waits for the device",
    "gpu_gap": "idle in a gap that comes once",
}
"""Kinds of idle time that end with a launch of the host."""
_LOST = {
    **_OF_HOST,
    "gpu_order": "idle although more was launched in time",
    "gpu_copy": "copying, with no kernel beside it",
    "gpu_set": "setting memory, with neither a kernel nor a copy beside it",
}
LONG_GAP_S = 0.01
"""Gaps that are so long, as a mean, do not come from launching alone."""
NOT_NCCL = 0.5
"""From this share of the time of kernels that communicate on, transfer is not told from waiting."""
_DEVICE = ["rank", "node", "pid", "device"]
_BY_CAUSE = {SYNCHRONISING: "gpu_sync", MPI: "gpu_mpi", CUDA_CALL: "gpu_cuda", idle.OS_CALL: "gpu_os"}
MOST_TOLD = 3
"""Functions and ranges that a sentence names."""


def per_device(gpu: pd.DataFrame) -> pd.DataFrame:
    """Seconds of a step (of the capture where ``gpu`` has no steps) that each device spends, by kind of loss.

    Columns rank, node, pid, device, span_s, ``idle``, ``host`` (idle until the host launches), ``gpu_order``,
    ``gpu_copy``, ``gpu_set``, ``gpu_comm``, ``gpu_wait`` and ``compute``.
    """
    chosen = counted(gpu)
    exposed = chosen["exposed_comm_s"]
    waited = chosen["comm_wait_s"].clip(upper=exposed)
    seconds = chosen[[*_DEVICE, "span_s"]].assign(
        idle=chosen["idle_s"],
        host=chosen["idle_host_s"],
        gpu_order=chosen["idle_other_s"],
        gpu_copy=_copying_alone(chosen),
        gpu_set=chosen["set_s"],
        gpu_comm=exposed - waited,
        gpu_wait=waited,
        compute=chosen["compute_s"],
    )
    means: pd.DataFrame = seconds.groupby(_DEVICE, as_index=False).mean()
    return means


def _copying_alone(gpu: pd.DataFrame) -> pd.Series[float]:
    """What is neither computation, communication, memory sets nor idle, nor unknown for want of records."""
    known = gpu[["compute_s", "exposed_comm_s", "set_s", "idle_s", "shared_s", "untraced_s"]].sum(axis=1)
    return (gpu["span_s"] - known).clip(lower=0.0)


def host_kinds(table: pd.DataFrame, *, in_steps: bool) -> pd.DataFrame:
    """The rows of ``idle`` that count, in which the host is late, with the kind of loss that each is.

    Those of the steps but the first, or of a capture without steps all.
    """
    scopes = [idle.STEPS] if in_steps else [idle.OUTSIDE_STEPS, idle.ONCE]
    rows = table[table["scope"].isin(scopes) & table["cause"].isin(idle.HOST_CAUSES)]
    long = rows["gaps_s"] >= LONG_GAP_S * rows["gaps"]
    kind = rows["cause"].map(_BY_CAUSE).fillna(long.map({True: "gpu_code", False: "gpu_host"}))
    loads = rows["loading"].astype(bool) & ~kind.isin(["gpu_sync", "gpu_mpi"])
    kind = kind.mask(loads, "gpu_data").mask(rows["scope"] == idle.ONCE, "gpu_gap")
    return rows.assign(kind=kind)


def _with_kinds(devices: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``devices`` with a column for each of _OF_HOST: what ``rows`` say of the idle time until the host launches."""
    by_kind = rows.pivot_table(index=_DEVICE, columns="kind", values="idle_s", aggfunc="sum", observed=True)
    by_kind = by_kind.reindex(columns=list(_OF_HOST)).reindex(pd.MultiIndex.from_frame(devices[_DEVICE])).fillna(0.0)
    whole = by_kind.sum(axis=1).to_numpy(float)
    # A device whose gaps nothing tells of has them all in the general kind.
    by_kind.loc[whole <= 0, "gpu_host"] = 1.0
    shares = by_kind.div(np.where(whole > 0, whole, 1.0), axis=0).to_numpy(float)
    return devices.assign(**dict(zip(_OF_HOST, (shares * devices["host"].to_numpy(float)[:, None]).T, strict=True)))


def in_steps(
    gpu: pd.DataFrame, idle_rows: pd.DataFrame, copies_rows: pd.DataFrame, own_work: Sequence[Finding]
) -> list[Finding]:
    """What all GPUs lose in each step, from the tables ``gpu``, ``idle`` and ``copies``.

    ``own_work`` tells what the hosts did meanwhile by their phases, such as loading, and is not counted again.
    """
    if gpu.empty or not gpu["step"].notna().any():
        return []
    rows = host_kinds(idle_rows, in_steps=True)
    known = per_device(gpu)
    if known.empty:
        return []
    devices = _with_kinds(known, rows)
    loading = sum(finding.lost_s for finding in own_work if finding.kind == "data")
    others = sum(finding.lost_s for finding in own_work if finding.kind != "data")
    steps = int(gpu.loc[gpu["step"].notna() & ~gpu["warmup"].astype(bool), "step"].nunique())
    found = []
    for kind in _LOST:
        # The lower median: what one device has more of makes its rank late, and counts there.
        lost = float(np.sort(devices[kind])[(len(devices) - 1) // 2])
        if kind == "gpu_data":
            lost, loading = max(0.0, lost - loading), max(0.0, loading - lost)
            others += loading
        elif kind in _OF_HOST and kind != "gpu_sync":
            lost, others = max(0.0, lost - others), max(0.0, others - lost)
        about = _Told(rows, copies_rows, "a step", len(devices) * max(steps, 1))
        found.append(_finding(kind, lost, devices, gpu, about))
    return found


def unmatched(context: AnalysisContext, named: Sequence[Finding]) -> list[Finding]:
    """Exposed communication in steps that no matched collective accounts for, such as in all-reduces of vLLM's own.

    ``named``: rows of ranks that others wait for. What they cost beyond the waiting in matched collectives was seen in
    another way. It can be the waiting in these kernels, and is not counted again.
    """
    gpu = context.gpu
    if gpu.empty or not gpu["step"].notna().any():
        return []
    chosen = counted(gpu)
    left = _unmatched_by_step(chosen, context.rows)
    whole = left.mean().clip(lower=0.0)
    elsewhere = sum(finding.lost_s for finding in named) - float(context.losses.sum()) / max(len(context.losses), 1)
    lost = float(whole.mean()) - max(0.0, elsewhere)
    if not lost > 0:  # nor if no step is left
        return []
    kernels = _unmatched_kernels(context)
    absent = network.unseen(context)
    waiting = [] if named or absent.missing > 0 else _waiting_for_one(context, left, chosen, kernels)
    rest = lost - sum(finding.lost_s for finding in waiting)
    rank = whole.idxmax()
    most = device_name(chosen[chosen["rank"] == rank].iloc[0])
    told = (
        f"GPUs communicate {rest:.3g} s a step with no computation beside it, in kernels that no matched collective "
        f"accounts for, so that transfer cannot be told from waiting for a rank that comes later{_by_kernel(kernels)}; "
        f"most of all {most}, {float(whole.max()):.3g} s a step"
    )
    kind = "unseen" if absent.missing > 0 else "gpu_comm"
    told += f"; {absent.in_words(with_steps=True)}" if absent.missing > 0 else ""
    where, worst = f"gpu: rank={rank}", _worst_step(context, left.mean(axis=1))
    return [*waiting, Finding(kind, CAUSES[kind], rest, None, "", "", told, LOW, where, worst)]


def _unmatched_by_step(gpu: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds of exposed communication of a GPU (a mean over those of a rank) that ``rows`` of matched collectives do
    not hold: a row a step, a column a rank."""
    by = gpu.groupby(["rank", "step"])
    exposed, devices = by["exposed_comm_s"].sum(), by["device"].nunique()
    if len(rows):
        held = rows.groupby(["rank", "step"])[["exposed_wait_ns", "exposed_transfer_ns"]].sum().sum(axis=1) / NS_PER_S
        exposed = exposed - held.reindex(exposed.index, fill_value=0.0)
    return (exposed / devices).unstack("rank")


def _unmatched_kernels(context: AnalysisContext) -> pd.DataFrame:
    """Kernels that communicate by ``rank`` and ``name``, ``calls`` and ``total_ns``; NCCL's if there are no others."""
    frames = [trace.kernels.assign(rank=trace.rank) for trace in context.traces if trace.kernels is not None]
    kernels = pd.concat(frames, ignore_index=True)
    kernels = kernels[kernels["communication"].astype(bool)]
    others = kernels[[kernel_op(str(name)) is None for name in kernels["name"]]]
    return (others if len(others) else kernels).groupby(["rank", "name"], as_index=False)[["calls", "total_ns"]].sum()


def _by_kernel(kernels: pd.DataFrame) -> str:
    by_name = kernels.groupby("name")["total_ns"].sum()
    shares = (by_name / max(float(by_name.sum()), 1.0)).nlargest(MOST_TOLD)
    told = ", ".join(f"{share:.0%} of their time in {name}" for name, share in shares.items())
    return f"; {told}" if told else ""


ALMOST_ALL, FEWEST_STEPS = 0.9, 8
ALIKE = 0.5
"""The others' kernels, and the steps, differ by no more than this share of what one rank's kernels are shorter."""


def _waiting_for_one(
    context: AnalysisContext, left: pd.DataFrame, gpu: pd.DataFrame, kernels: pd.DataFrame
) -> list[Finding]:
    """The rank whose kernels are far shorter than all others' in almost every step, so that these wait for it.

    None if that is not clear. The ranks must have run the same kernels equally often, which all of them wait in, in
    steps of the same length, and the other ranks' must be alike: else it can be another group's, or other bytes.
    """
    means, spans = left.mean(), gpu.groupby("rank")["span_s"].mean()
    calls = kernels.pivot_table(index="name", columns="rank", values="calls", aggfunc="sum", fill_value=0)
    if len(means) < 2 or len(left) < FEWEST_STEPS or left.isna().to_numpy().any() or calls.shape[1] != len(means):
        return []
    if (calls.nunique(axis=1) > 1).any() or not all(waits_for_all(str(name)) for name in calls.index):
        return []
    late = int(means.index[int(means.to_numpy(float).argmin())])
    longer = left.drop(columns=late).sub(left[late], axis=0)
    least, often = float(longer.mean().min()), float((longer.min(axis=1) > 0).mean())
    apart = max(float(longer.mean().max()) - least, float(spans.max() - spans.min()))
    # Exposed for a shorter time is also what more computation hides.
    run_s = kernels.groupby("rank")["total_ns"].sum() / NS_PER_S / len(left)
    is_far = least >= max(STRAGGLER_SHARE * float(spans.mean()), float(means[late]))
    runs_shorter = float(run_s.drop(late).min() - run_s[late]) >= ALIKE * least
    if often < ALMOST_ALL or apart > ALIKE * least or not (is_far and runs_shorter):
        return []
    trace = next(trace for trace in context.traces if trace.rank == late)
    told = (
        f"kernels that communicate run {float(longer.mean().mean()):.3g} s a step shorter on {trace.name} than on the "
        f"others, which wait for it in them, in {int((longer.min(axis=1) > 0).sum())} of {len(left)} steps"
        f"{_by_kernel(kernels)}"
    )
    what, in_words = excess(context.gpu, trace.rank)
    told += f"; {in_words}" if what else ""
    by_step = longer.sum(axis=1) / len(means)
    lost, where, worst = float(by_step.mean()), f"gpu: rank={late}", _worst_step(context, by_step)
    found = Finding("gpu_wait", CAUSES["gpu_wait"], lost, trace.rank, trace.node, "", told, MEDIUM, where, worst)
    return [replace(found, gpu_excess=what)]


def _worst_step(context: AnalysisContext, by_step: pd.Series) -> int | None:
    return context.worst_step(by_step.reindex(context.steps.numbers).fillna(0.0).to_numpy(float))


def of_capture(tables: Mapping[str, pd.DataFrame], unseen: Unseen = EVERYBODY) -> list[Finding]:
    """What the GPUs of a capture without steps lose, of the whole of it, as a mean over devices.

    From the tables ``gpu``, ``idle``, ``copies``, ``kernels`` and ``collectives``. ``unseen``: ranks that these may
    wait for, although no report shows them.
    """
    gpu = tables["gpu"]
    if gpu.empty:
        return []
    steps = int(counted(gpu).groupby(_DEVICE)["step"].nunique().max())  # if the ranks have some, but none in common
    rows = host_kinds(tables["idle"], in_steps=steps > 0)
    devices = _with_kinds(per_device(gpu), rows)
    about = _Told(rows, tables["copies"], "a step" if steps else "in all", len(devices) * max(steps, 1))
    found = [_finding(kind, float(devices[kind].mean()), devices, gpu, about) for kind in _LOST]
    found.append(_communication(devices, tables, unseen, about.each))
    found.append(_waiting(devices, tables["collectives"], unseen))
    return found


class _Told(NamedTuple):
    """What the evidence of a finding is made of."""

    rows: pd.DataFrame
    """As :func:`host_kinds` gives them."""
    copies: pd.DataFrame
    each: str
    per: int
    """Devices, times the steps if there are any: what seconds of ``rows`` are divided by."""


def _finding(kind: str, lost: float, devices: pd.DataFrame, gpu: pd.DataFrame, about: _Told) -> Finding:
    most = devices.iloc[int((devices[kind] / devices["span_s"]).to_numpy(float).argmax())]
    told = f"GPUs are {_LOST[kind]}: {lost:.3g} s {about.each}; most of all {device_name(most)}, {_share(most, kind)}"
    function, moves, pointer = "", "", _rows(most)
    own = about.rows[about.rows["kind"] == kind]
    if kind == "gpu_order":
        by_cause = gpu.groupby("idle_other_cause")["idle_other_s"].sum()
        told += f"; most of it is {by_cause.idxmax()}"
    elif kind == "gpu_copy":
        mine = about.copies[_of_device(about.copies, most)]
        told += copies.in_words(mine)
        moves = copies.what_moves(mine)
    elif kind == "gpu_gap" and len(own):
        told = _single_gap(own, devices, gpu)
        pointer = f"idle: scope={idle.ONCE}"
    elif len(own):
        function = str(_longest(own, "idle_s")["what"])
        told += _split(about) + _largest(own)
        pointer = _rows(most).replace("gpu:", "idle:")
    # What the OS did would be seen if it had been traced.
    sure = LOW if kind == "gpu_code" and (own["cause"] == idle.UNTRACED_CODE).any() else MEDIUM
    return Finding(kind, CAUSES[kind], lost, None, "", "", told, sure, pointer, moves=moves, function=function)


def _of_device(table: pd.DataFrame, device: pd.Series) -> pd.Series:
    return pd.Series((table[["rank", "pid", "device"]] == device[["rank", "pid", "device"]]).all(axis=1), dtype=bool)


def _doing(rows: pd.DataFrame) -> pd.Series:
    """What the host is in, in words."""
    own = (
        rows["cause"]
        .map({idle.UNTRACED_CODE: "its own code or OS calls, which were not traced"})
        .fillna("its own code")
    )
    return own.where(rows["what"] == "", rows["what"] + "()")


def _split(about: _Told) -> str:
    """What the host does while GPUs wait for it: functions and ranges."""
    rows = about.rows[about.rows["kind"] != "gpu_gap"]
    whole, functions = float(rows["idle_s"].sum()), rows.groupby(_doing(rows))["idle_s"].sum()
    synchronising = float(rows.loc[rows["cause"] == SYNCHRONISING, "idle_s"].sum())
    ranges = rows[rows["range"] != ""].groupby("range")["idle_s"].sum()
    told = f"; of {whole / about.per:.3g} s in which they wait for the host, {_most_of(functions, about.per)}"
    share = f"{synchronising / about.per:.3g} s" if synchronising > 0 else "nothing"
    told += f"; {share} of it is in calls that wait for the device"
    return told + (f"; by ranges, {_most_of(ranges, about.per)}" if len(ranges) else "")


def _most_of(seconds: pd.Series, count: int) -> str:
    most = seconds.nlargest(MOST_TOLD)
    return ", ".join(f"{value / count:.3g} s in {name}" for name, value in most.items())


def _longest(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows.iloc[int(rows[column].to_numpy(np.float64).argmax())]


def _largest(own: pd.DataFrame) -> str:
    """How many gaps hold most of it, and the longest of them."""
    row = _longest(own, "idle_s")
    what = f"{row['what']}()" if row["what"] else "this"
    where = f" in range {row['range']}" if row["range"] else ""
    gaps = f"{row['gaps']} gap{'s' if row['gaps'] > 1 else ''}"
    return f"; {what}{where} is in {gaps} of {device_name(row)}, for {row['largest_s']:.3g} s at the most"


def _single_gap(own: pd.DataFrame, devices: pd.DataFrame, gpu: pd.DataFrame) -> str:
    """The longest gap that comes once: where it lies, what the host did, and what the rest of the capture loses."""
    row = _longest(own, "largest_gap_s")
    device = gpu[_of_device(gpu, row)].iloc[0]
    after = max(0.0, float(row["largest_start_s"] - device["start_s"]))
    gaps = own.groupby(_DEVICE)["largest_start_s"].nunique()
    told = (
        f"one gap of {row['largest_gap_s']:.3g} s on {device_name(row)}, {after:.3g} s after its first activity"
        f"{', before range ' + row['before'] if row['before'] else ''}"
    )
    if int(gaps.sum()) > 1:
        told += f"; with others that come once, {int(gaps.sum())} gaps on {len(gaps)} GPU{'s' if len(gaps) > 1 else ''}"
    told += f"; meanwhile the host spends {_most_of(own.groupby(_doing(own))['idle_s'].sum(), len(devices))}"
    ranges = own[own["range"] != ""].groupby("range")["idle_s"].sum()
    told += f"; by ranges, {_most_of(ranges, len(devices))}" if len(ranges) else ""
    rest, late = (float((devices[each] - devices["gpu_gap"]).mean()) for each in ("span_s", "idle"))
    return told + f"; without it GPUs are idle for {late / rest if rest > 0 else 0.0:.1%} of the other {rest:.3g} s"


def _communication(devices: pd.DataFrame, tables: Mapping[str, pd.DataFrame], unseen: Unseen, each: str) -> Finding:
    kernels, collectives = tables["kernels"], tables["collectives"]
    lost = float(devices["gpu_comm"].mean())
    most = devices.iloc[int((devices["gpu_comm"] / devices["span_s"]).to_numpy(float).argmax())]
    told = (
        f"kernels that communicate run {lost:.3g} s {each} with no computation beside them, most of all on "
        f"{device_name(most)}, {_share(most, 'gpu_comm')}"
    )
    names = kernels[kernels["communication"].astype(bool)].groupby("name")["total_s"].sum()
    told += f"; in all {_most_of(names, len(devices))}" if len(names) else ""
    others = float(names[[kernel_op(str(name)) is None for name in names.index]].sum())
    if unseen.missing > 0:
        told += f"; {unseen.in_words()}, so that transfer cannot be told from waiting for them"
        return Finding("unseen", CAUSES["unseen"], lost, None, "", "", told, LOW, _rows(most))
    why = network.withdrawn(collectives)
    if others > NOT_NCCL * float(names.sum()):
        why = "most of them are not NCCL's and are not matched between ranks"
    if why:
        told += f"; {why}, so that part of it may be waiting"
        return Finding("gpu_comm", CAUSES["gpu_comm"], lost, None, "", "", told, LOW, _rows(most))
    return Finding("transfer", CAUSES["transfer"], lost, None, "", "", told, MEDIUM, _rows(most))


def _waiting(devices: pd.DataFrame, collectives: pd.DataFrame, unseen: Unseen) -> Finding:
    """Waiting in collectives; with the device that most of it is for, where it is one."""
    lost = float(devices["gpu_wait"].mean())
    waits = collectives[collectives["late_rank"].notna() & collectives["wait_s"].notna()]
    by_late = waits.groupby("late_rank")["wait_s"].sum().sort_values(ascending=False)
    told, rank, node, confidence, does = "GPUs wait in collectives for the one that comes last", None, "", LOW, ""
    most = devices.iloc[int(devices["gpu_wait"].to_numpy(float).argmax())]
    if len(by_late) and by_late.iloc[0] >= ONE_IS_LATE * by_late.sum() > 0:
        late = devices[devices["rank"] == int(by_late.index[0])]
        if len(late):
            one = late.iloc[0]
            rank, node, confidence = int(one["rank"]), str(one["node"]), MEDIUM
            told = f"the others wait in collectives for {device_name(one)}, {by_late.iloc[0] / by_late.sum():.0%} of it"
            for what, column in ((COMPUTES, "compute"), (IDLES, "idle")):
                if (more := float(one[column] - np.median(devices[column]))) > lost / 2:
                    told, does = f"{told}; it {what} {more:.3g} s longer than the median GPU", what
    if unseen.missing > 0:
        told, confidence = f"{told}; {unseen.in_words()}, and may come later still", LOW
    if len(waits):
        told += f"; matched by {' and '.join(sorted(set(waits['basis'])))}"
    return Finding("gpu_wait", CAUSES["gpu_wait"], lost, rank, node, "", told, confidence, _rows(most), gpu_excess=does)


def device_name(row: Mapping[Any, Any] | pd.Series) -> str:
    """``GPU 1 of rank 3 on node2``; the process stands for a rank that the report does not tell."""
    owner = f"rank {row['rank']}" if int(row["rank"]) >= 0 else f"process {row['pid']}"
    return f"GPU {row['device']} of {owner}" + (f" on {row['node']}" if row["node"] else "")


COMPUTES, IDLES, COPIES, SETS = "computes", "is idle", "copies", "sets memory"


def excess(gpu: pd.DataFrame, rank: int) -> tuple[str, str]:
    """What a late rank's GPU does for longer than its peers', and that in words; empty if nothing."""
    if gpu.empty or not gpu["step"].notna().any():
        return "", ""
    devices = per_device(gpu)
    own, peers = devices[devices["rank"] == rank], devices[devices["rank"] != rank]
    if own.empty or peers.empty:
        return "", ""
    kinds = {COMPUTES: "compute", IDLES: "idle", COPIES: "gpu_copy", SETS: "gpu_set"}
    more = {what: float(own[column].mean() - peers[column].median()) for what, column in kinds.items()}
    most = max(more, key=lambda what: more[what])
    if more[most] <= 0:
        return "", ""
    return most, f"its GPU {most} {more[most]:.3g} s a step longer than its peers'"


def _share(row: pd.Series, kind: str) -> str:
    return f"{float(row[kind] / row['span_s']):.1%} of its time"


def _rows(row: pd.Series) -> str:
    return f"gpu: rank={row['rank']} device={row['device']}"


def span_s(gpu: pd.DataFrame) -> float:
    """Mean over devices of what stands for the step of a capture without steps."""
    return float(per_device(gpu)["span_s"].mean()) if len(gpu) else 0.0


def repeated_s(gpu: pd.DataFrame, findings: Sequence[Finding]) -> float:
    """What is left of :func:`span_s` without gaps that come once."""
    return span_s(gpu) - sum(finding.lost_s for finding in findings if finding.kind == "gpu_gap")
