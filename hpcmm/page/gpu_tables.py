"""What GPUs did, by name: the tables of the page and of ``summary.md`` that need no steps."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from hpcmm.analysis.study import Study

MOST_ROWS = 12


@dataclass(frozen=True, slots=True)
class GpuTable:
    """Sums over ranks and GPUs, the largest first. ``name`` is that of the table with every rank's rows."""

    title: str
    note: str
    frame: pd.DataFrame
    name: str


def gpu_tables(study: Study) -> list[GpuTable]:
    """Top kernels, copies, idle time by cause, and NVTX ranges; those that hold anything."""
    made = [
        GpuTable("Top kernels", "Sums over GPUs; share of the time of all kernels.", _kernels(study), "kernels"),
        GpuTable("Copies", "By direction and kind of memory on the host's side.", _copies(study), "copies"),
        GpuTable(
            "Idle time of the GPUs by cause",
            "What the host did meanwhile, in the NVTX range that it was in.",
            _idle(study),
            "idle",
        ),
        GpuTable(
            "NVTX ranges on the GPUs",
            "What each range launched: envelope and union of its work on the GPU.",
            _projection(study),
            "projection",
        ),
    ]
    return [table for table in made if len(table.frame)]


def _kernels(study: Study) -> pd.DataFrame:
    table = study.tables["kernels"]
    found = table.groupby(["name", "communication"], as_index=False)[["calls", "total_s"]].sum()
    whole = float(found["total_s"].sum())
    found = found.sort_values("total_s", ascending=False, kind="stable")
    return found.assign(share=found["total_s"] / whole if whole else 0.0)[
        ["name", "calls", "total_s", "share", "communication"]
    ]


def _copies(study: Study) -> pd.DataFrame:
    table = study.tables["copies"]
    sums = ["copies", "bytes", "copy_s", "exposed_s"]
    found = table.groupby(["direction", "memory"], as_index=False)[sums].sum()
    found = found.sort_values("copy_s", ascending=False, kind="stable")
    return found.assign(bytes_per_s=found["bytes"] / found["copy_s"].where(found["copy_s"] > 0))


def _idle(study: Study) -> pd.DataFrame:
    table = study.tables["idle"]
    found = table.groupby(["cause", "what", "range"], as_index=False).agg(
        idle_s=("idle_s", "sum"), gaps=("gaps", "sum"), largest_s=("largest_s", "max")
    )
    return found.sort_values("idle_s", ascending=False, kind="stable")


def _projection(study: Study) -> pd.DataFrame:
    table = study.tables["projection"]
    sums = ["calls", "open_calls", "host_s", "gpu_envelope_s", "gpu_union_s", "kernels", "copies"]
    found = table.groupby(["domain", "range"], as_index=False)[sums].sum()
    return found.sort_values("gpu_union_s", ascending=False, kind="stable")
