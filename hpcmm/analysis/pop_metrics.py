"""The POP efficiencies of the run, of each step and of each phase, with the node level of DLB's TALP.

U_r is the useful time of rank r (its step thread outside exposed communication), W_r its exposed waiting, X_r its
exposed transfer, all over the scope; T = max_r of the scope's duration on rank r. Then

- parallel efficiency PE = mean(U) / T = LB * CommE,
- load balance LB = mean(U) / max(U) = LB_in * LB_between, with U_n the mean over the ranks of node n:
  LB_in = max(U_n) / max(U), LB_between = mean(U) / max(U_n),
- communication efficiency CommE = max(U) / T = SerE * TE, with T_ideal = max_r(U_r + W_r), the runtime on a network
  that transfers in no time: serialisation SerE = max(U) / T_ideal, transfer TE = T_ideal / T,
- against a reference run: computation scaling = sum(U_ref) / sum(U), for the same work; global efficiency =
  PE * computation scaling.

The definitions are those of the POP centre of excellence and of DLB's TALP. T_ideal is taken from the measured time
line, transfer taken away and waiting left; the run is not replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.analysis.delay_costs import Floats
from hpcmm.analysis.phases import StepTimes

RUN, STEP, PHASE, WARMUP = "run", "step", "phase", "warmup"

COLUMNS = [
    "scope",
    "step",
    "phase",
    "ranks",
    "nodes",
    "runtime_s",
    "useful_mean_s",
    "useful_max_s",
    "parallel_efficiency",
    "load_balance",
    "load_balance_in_node",
    "load_balance_between_nodes",
    "communication_efficiency",
    "serialisation_efficiency",
    "transfer_efficiency",
    "computation_scaling",
    "global_efficiency",
]
EFFICIENCIES = COLUMNS[8:15]
"""The columns that lie between 0 and 1, and need no reference."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What computation scaling needs of the reference run: useful seconds a step, summed over its ranks."""

    useful_s: float
    by_phase: Mapping[str, float]
    samples_per_step: int | None = None
    """Samples of one step over all ranks, if the run's configuration tells."""

    @classmethod
    def of(cls, table: pd.DataFrame, samples_per_step: int | None) -> Reference | None:
        """From the reference run's own efficiency table; None if that has no steps."""
        steps = int((table["scope"] == STEP).sum())
        if not steps:
            return None
        total = (table["useful_mean_s"] * table["ranks"]).astype(np.float64) / steps
        run = float(total[table["scope"] == RUN].iloc[0])
        phases = table["scope"] == PHASE
        return cls(run, dict(zip(table.loc[phases, "phase"], total[phases], strict=True)), samples_per_step)


def samples_per_step(config: Mapping[str, Any]) -> int | None:
    """Samples that all ranks together train on in one step, by the run's configuration; None if it does not tell."""
    cluster, train = config.get("cluster"), config.get("train")
    if not isinstance(cluster, dict) or not isinstance(train, dict):
        return None
    factors = [
        cluster.get("nodes"),
        cluster.get("ranks_per_node"),
        train.get("micro_batch_size"),
        train.get("gradient_accumulation_steps"),
    ]
    if not all(isinstance(factor, int) and factor > 0 for factor in factors):
        return None
    return math.prod(int(str(factor)) for factor in factors)


def efficiency(
    phases: pd.DataFrame,
    steps: StepTimes,
    reference: Reference | None = None,
    samples: int | None = None,
    *,
    waiting_is_known: bool = True,
) -> pd.DataFrame:
    """Table of COLUMNS from table ``phases``: rows of the run, of the warm-up step, of each other step, of each phase.

    The run and the phases are over the steps that are not warm-up. Computation scaling takes each step to be the same
    work in both runs or, where ``samples`` a step and the reference's are known, each sample. If it was not recorded
    when ranks waited for one another, useful time is not known, and there are no efficiencies (NaN).
    """
    phases = phases[~phases["rank"].isin(steps.left_out)]
    times = _Times.of(phases[phases["step"].isin(steps.numbers)])
    if times is None:
        return pd.DataFrame(columns=COLUMNS)
    frames = [times.summed(("step", "phase")).assign(scope=RUN)]
    warm = _Times.of(phases[phases["step"] == steps.warmup_number]) if steps.warmup_number is not None else None
    if warm is not None:
        frames.append(warm.summed(("phase",)).assign(scope=WARMUP))
    frames += [times.summed(("phase",)).assign(scope=STEP), times.summed(("step",)).assign(scope=PHASE)]
    table = pd.concat(frames, ignore_index=True)
    if reference is not None:
        table = _scaled(table, len(times.steps), reference, samples)
    if not waiting_is_known:
        table = table.assign(**dict.fromkeys(COLUMNS[COLUMNS.index(EFFICIENCIES[0]) :], np.nan))
    return table.reindex(columns=COLUMNS).astype(
        {"step": "Int64", "computation_scaling": np.float64, "global_efficiency": np.float64}
    )


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of each rank in each step and phase: arrays of shape (ranks, steps, phases)."""

    ranks: npt.NDArray[np.int64]
    nodes: npt.NDArray[np.intp]
    """Number of each rank's node."""
    steps: npt.NDArray[np.int64]
    phases: list[str]
    whole: Floats
    useful: Floats
    wait: Floats

    @classmethod
    def of(cls, rows: pd.DataFrame) -> _Times | None:
        if rows.empty:
            return None
        ranks, first, rank = np.unique(rows["rank"].to_numpy(np.int64), return_index=True, return_inverse=True)
        steps, step = np.unique(rows["step"].to_numpy(np.int64), return_inverse=True)
        phase, phases = pd.factorize(rows["within"].where(rows["within"] != "", rows["phase"]), sort=True)
        nodes, _ = pd.factorize(rows["node"].iloc[first])

        def array(column: str) -> Floats:
            filled = np.zeros((len(ranks), len(steps), len(phases)))
            np.add.at(filled, (rank, step, phase), rows[column].to_numpy(np.float64))
            return filled

        seconds = (array("duration_s"), array("useful_s"), array("wait_s"))
        return cls(ranks, nodes, steps, [str(name) for name in phases], *seconds)

    def summed(self, over: tuple[str, ...]) -> pd.DataFrame:
        """Efficiencies of the times summed over steps, phases or both; one row for what is left."""
        axes = tuple({"step": 1, "phase": 2}[name] for name in over)
        whole, useful, wait = (
            times.sum(axis=axes).reshape(len(self.ranks), -1) for times in (self.whole, self.useful, self.wait)
        )
        table = _hierarchy(whole, useful, wait, self.nodes)
        table["step"] = pd.array(self.steps if "step" not in over else [pd.NA] * len(table), dtype="Int64")
        return table.assign(phase=self.phases if "phase" not in over else "")


def _hierarchy(whole: Floats, useful: Floats, wait: Floats, nodes: npt.NDArray[np.intp]) -> pd.DataFrame:
    """One row a column of the times (ranks, columns) in seconds. A ratio of nothing to nothing is NaN."""
    count = int(nodes.max()) + 1
    by_node = np.stack([useful[nodes == node].mean(axis=0) for node in range(count)])
    mean, most, node_most = useful.mean(axis=0), useful.max(axis=0), by_node.max(axis=0)
    runtime, ideal = whole.max(axis=0), (useful + wait).max(axis=0)
    return pd.DataFrame(
        {
            "ranks": len(useful),
            "nodes": count,
            "runtime_s": runtime,
            "useful_mean_s": mean,
            "useful_max_s": most,
            "parallel_efficiency": _ratio(mean, runtime),
            "load_balance": _ratio(mean, most),
            "load_balance_in_node": _ratio(node_most, most),
            "load_balance_between_nodes": _ratio(mean, node_most),
            "communication_efficiency": _ratio(most, runtime),
            "serialisation_efficiency": _ratio(most, ideal),
            "transfer_efficiency": _ratio(ideal, runtime),
        }
    )


def _ratio(part: Floats, whole: Floats) -> Floats:
    """``part / whole``, at most 1: sums of the same times in another order differ in their last bits."""
    ratio: Floats = np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
    return np.minimum(ratio, 1.0)


def _scaled(table: pd.DataFrame, steps: int, reference: Reference, samples: int | None) -> pd.DataFrame:
    """Add computation scaling and global efficiency against ``reference``."""
    in_steps = np.where(table["scope"].isin([RUN, PHASE]), steps, 1)
    useful = (table["useful_mean_s"] * table["ranks"]).to_numpy(np.float64) / in_steps
    base = np.where(
        table["scope"] == PHASE, table["phase"].map(dict(reference.by_phase)).to_numpy(np.float64), reference.useful_s
    )
    work = samples / reference.samples_per_step if samples and reference.samples_per_step else 1.0
    scaling = np.divide(base * work, useful, out=np.full_like(useful, np.nan), where=useful > 0)
    scaling = np.where(table["scope"] == WARMUP, np.nan, scaling)
    return table.assign(computation_scaling=scaling, global_efficiency=table["parallel_efficiency"] * scaling)
