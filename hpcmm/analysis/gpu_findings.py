"""What the GPUs lose besides late ranks and transfer: idle time by cause, copies, and whom collectives wait for.

In steps, a time that is idle or copying on more than half of the devices is everybody's; what one device has more of
than its peers is why its rank is late, and is charged there. Without steps the whole capture is taken for one, and
waiting in collectives, which nothing else tells of then, gets a row as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hpcmm.analysis.findings import CAUSES, LOW, MEDIUM, Finding
from hpcmm.analysis.gpu_trace import counted
from hpcmm.analysis.process_groups import Unseen

EVERYBODY = Unseen(0, 0)
ONE_IS_LATE = 2 / 3
"""A device is named for the waiting of the others when it comes last in so much of it."""
_LOST = {
    "gpu_host": "idle until the host has launched more",
    "gpu_sync": "idle after the host had waited for the device (a synchronising call, or a copy that is none too)",
    "gpu_order": "idle although more was launched in time",
    "gpu_copy": "copying, with no kernel beside it",
}


def per_device(gpu: pd.DataFrame) -> pd.DataFrame:
    """Seconds of a step (of the capture where ``gpu`` has no steps) that each device spends, by kind of loss.

    Columns rank, node, pid, device, span_s, the kinds of :data:`_LOST`, ``gpu_comm``, ``gpu_wait`` and ``compute``.
    """
    chosen = counted(gpu)
    exposed = chosen["exposed_comm_s"]
    waited = chosen["comm_wait_s"].clip(upper=exposed)
    seconds = chosen[["rank", "node", "pid", "device", "span_s"]].assign(
        gpu_host=chosen["idle_host_s"] - chosen["idle_sync_s"],
        gpu_sync=chosen["idle_sync_s"],
        gpu_order=chosen["idle_other_s"],
        gpu_copy=_copying_alone(chosen),
        gpu_comm=exposed - waited,
        gpu_wait=waited,
        compute=chosen["compute_s"],
    )
    means: pd.DataFrame = seconds.groupby(["rank", "node", "pid", "device"], as_index=False).mean()
    return means


def _copying_alone(gpu: pd.DataFrame) -> pd.Series[float]:
    """What is neither computation, communication nor idle, nor unknown for want of records."""
    known = gpu[["compute_s", "exposed_comm_s", "idle_s", "shared_s", "untraced_s"]].sum(axis=1)
    return (gpu["span_s"] - known).clip(lower=0.0)


def in_steps(gpu: pd.DataFrame, accounted_s: float) -> list[Finding]:
    """What all GPUs lose in each step. ``accounted_s`` a step is idle time that other rows explain (loading, say)."""
    if gpu.empty or not gpu["step"].notna().any():
        return []
    devices = per_device(gpu)
    if devices.empty:
        return []
    found = []
    for kind in _LOST:
        # The lower median: what one device has more of makes its rank late, and counts there.
        lost = float(np.sort(devices[kind])[(len(devices) - 1) // 2])
        if kind == "gpu_host":
            lost = max(0.0, lost - accounted_s)
        found.append(_finding(kind, lost, devices, gpu, "a step"))
    return found


def of_capture(gpu: pd.DataFrame, collectives: pd.DataFrame, unseen: Unseen = EVERYBODY) -> list[Finding]:
    """What the GPUs of a capture without steps lose, of the whole of it, as a mean over devices.

    ``unseen``: ranks that these may wait for, although no report shows them.
    """
    if gpu.empty:
        return []
    devices = per_device(gpu)
    found = [_finding(kind, float(devices[kind].mean()), devices, gpu, "in all") for kind in _LOST]
    found.append(_communication(devices, unseen))
    found.append(_waiting(devices, collectives, unseen))
    return found


def _finding(kind: str, lost: float, devices: pd.DataFrame, gpu: pd.DataFrame, each: str) -> Finding:
    most = devices.iloc[int((devices[kind] / devices["span_s"]).to_numpy(float).argmax())]
    told = f"GPUs are {_LOST[kind]}: {lost:.3g} s {each}; most of all {device_name(most)}, {_share(most, kind)}"
    if kind == "gpu_order":
        by_cause = gpu.groupby("idle_other_cause")["idle_other_s"].sum()
        told += f"; most of it is {by_cause.idxmax()}"
    return Finding(kind, CAUSES[kind], lost, None, "", "", told, MEDIUM, _rows(most))


def _communication(devices: pd.DataFrame, unseen: Unseen) -> Finding:
    lost = float(devices["gpu_comm"].mean())
    most = devices.iloc[int((devices["gpu_comm"] / devices["span_s"]).to_numpy(float).argmax())]
    told = f"NCCL's kernels run {lost:.3g} s in all with no computation beside them, {_most(most, 'gpu_comm')}"
    if unseen.missing > 0:
        told += f"; {unseen} have no report, so that transfer cannot be told from waiting for them"
        return Finding("unseen", CAUSES["unseen"], lost, None, "", "", told, LOW, _rows(most))
    return Finding("transfer", CAUSES["transfer"], lost, None, "", "", told, MEDIUM, _rows(most))


def _waiting(devices: pd.DataFrame, collectives: pd.DataFrame, unseen: Unseen) -> Finding:
    """Waiting in collectives; with the device that most of it is for, where it is one."""
    lost = float(devices["gpu_wait"].mean())
    waits = collectives[collectives["late_rank"].notna() & collectives["wait_s"].notna()]
    by_late = waits.groupby("late_rank")["wait_s"].sum().sort_values(ascending=False)
    told, rank, node, confidence = "GPUs wait in collectives for the one that comes last", None, "", LOW
    most = devices.iloc[int(devices["gpu_wait"].to_numpy(float).argmax())]
    if len(by_late) and by_late.iloc[0] >= ONE_IS_LATE * by_late.sum() > 0:
        rank = int(by_late.index[0])
        late = devices[devices["rank"] == rank]
        if len(late):
            one = late.iloc[0]
            node, confidence = str(one["node"]), MEDIUM
            told = f"the others wait in collectives for {device_name(one)}, {by_late.iloc[0] / by_late.sum():.0%} of it"
            more = float(one["compute"] - np.median(devices["compute"]))
            if more > lost / 2:
                told += f"; it computes {more:.3g} s longer than the median GPU"
        else:
            rank = None
    if unseen.missing > 0:
        told, confidence = f"{told}; {unseen} have no report, and may come later still", LOW
    basis = sorted(set(waits["basis"]))
    if basis:
        told += f"; matched by {' and '.join(basis)}"
    return Finding("gpu_wait", CAUSES["gpu_wait"], lost, rank, node, "", told, confidence, _rows(most))


def device_name(row: Mapping[Any, Any] | pd.Series) -> str:
    """``GPU 1 of rank 3 on node2``; the process stands for a rank that the report does not tell."""
    owner = f"rank {row['rank']}" if int(row["rank"]) >= 0 else f"process {row['pid']}"
    return f"GPU {row['device']} of {owner}" + (f" on {row['node']}" if row["node"] else "")


def excess(gpu: pd.DataFrame, rank: int) -> str:
    """Whether a late rank's GPU computes longer than its peers' or idles longer, in words; empty if neither."""
    if gpu.empty or not gpu["step"].notna().any():
        return ""
    devices = per_device(gpu)
    own, peers = devices[devices["rank"] == rank], devices[devices["rank"] != rank]
    if own.empty or peers.empty:
        return ""
    kinds = {"computes": ["compute"], "is idle": ["gpu_host", "gpu_sync", "gpu_order"], "copies": ["gpu_copy"]}
    more = {
        what: float(own[columns].sum(axis=1).mean() - peers[columns].sum(axis=1).median())
        for what, columns in kinds.items()
    }
    most = max(more, key=lambda what: more[what])
    return f"its GPU {most} {more[most]:.3g} s a step longer than its peers'" if more[most] > 0 else ""


def _most(row: pd.Series, kind: str) -> str:
    return f"most of all on {device_name(row)}, {_share(row, kind)}"


def _share(row: pd.Series, kind: str) -> str:
    return f"{float(row[kind] / row['span_s']):.1%} of its time"


def _rows(row: pd.Series) -> str:
    return f"gpu: rank={row['rank']} device={row['device']}"


def span_s(gpu: pd.DataFrame) -> float:
    """Mean over devices of what stands for the step of a capture without steps."""
    return float(per_device(gpu)["span_s"].mean()) if len(gpu) else 0.0
