"""Training on 1, 2 and 4 nodes: samples a second, efficiencies, and what the analysis says takes the rest; as Markdown.

    python benchmarks/scaling.py [--nodes 1 2 4] [--steps 20] [--json FILE] [KEY=VALUE ...]

Each run is a real job under nsys, launched and analysed by hpcmm, the smallest one as the others' reference. Every rank
keeps its micro-batch, so the work grows with the nodes (weak scaling). Speed-up is samples a second over the smallest
run's. Parallel efficiency is the mean share of a step in which a rank computes; computation scaling is how much useful
time the reference needs over this run's, per sample (docs/tables.md). On the local Slurm the nodes share one machine's
cores: the table then shows that the nodes do not add cores, and what the ranks wait for.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import measuring
import pandas as pd
from measuring import Row, ratio, summary

from hpcmm.config import config_file
from hpcmm.runs.run_dir import RunDir

FACTORS = ("parallel_efficiency", "load_balance", "serialisation_efficiency", "transfer_efficiency")
OF_REFERENCE = ("computation_scaling", "global_efficiency")
CONFIGURATION = ("experiment=anomaly_demo", "train.evaluate=false", "wait=true")


@dataclass(frozen=True, slots=True)
class Measured:
    """A run: its nodes and ranks, its steps' seconds, samples a second, and the tables of its analysis."""

    nodes: int
    ranks: int
    step_s: list[float]
    samples_per_s: float
    efficiency: pd.Series
    bottlenecks: pd.DataFrame


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured: list[Measured] = []
        reference: Path | None = None
        for nodes in sorted(options.nodes):
            run = launch(nodes, options.steps, options.overrides, Path(folder))
            analysis = analyse(run, reference)
            reference = reference or analysis
            measured.append(measure(run, analysis))
    print("\n".join(table(measured)))
    measuring.write(options.json, "scaling", [row(run, measured[0]) for run in measured])


def launch(nodes: int, steps: int, overrides: list[str], folder: Path) -> RunDir:
    """Train, and wait for the end; a failed run ends the benchmark."""
    own = [f"cluster.nodes={nodes}", f"train.steps={steps}", f"name=on_{nodes}", f"runs_root={folder}"]
    command = [sys.executable, "-m", "hpcmm.launch", *CONFIGURATION, *own, *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return RunDir(next(folder.glob(f"on_{nodes}-*")))


def analyse(run: RunDir, reference: Path | None) -> Path:
    """The folder of the run's analysis."""
    out = run.root / "analysis"
    stated = ["--reference", str(reference)] if reference else []
    command = [sys.executable, "-m", "hpcmm.analyze", str(run.root), "--out", str(out), *stated]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return out


def measure(run: RunDir, analysis: Path) -> Measured:
    config = config_file.load(run.config)
    records = [json.loads(line) for line in run.rank_metrics(0).read_text(encoding="utf-8").splitlines()]
    step_s = [record["step_s"] for record in records if record["event"] == "step"][1:-1]  # warm-up, checkpoint
    efficiency = pd.read_csv(analysis / "efficiency.csv")
    return Measured(
        nodes=config.cluster.nodes,
        ranks=config.world_size,
        step_s=step_s,
        samples_per_s=config.global_batch_size / statistics.median(step_s),
        efficiency=efficiency[efficiency["scope"] == "run"].iloc[0],
        bottlenecks=pd.read_csv(analysis / "bottlenecks.csv"),
    )


def table(measured: list[Measured]) -> list[str]:
    lines = [
        "| nodes | ranks | samples/s | speed-up | parallel efficiency | load balance | serialisation | transfer "
        "| computation scaling | global efficiency | the rest goes to |",
        "|" + "---|" * 11,
    ]
    smallest = measured[0]
    for run in measured:
        shown = [f"{run.efficiency[name]:.0%}" for name in FACTORS]
        shown += [percent(run.efficiency[name]) for name in OF_REFERENCE]
        reasons = [f"{row.cause} {row.step_share:.0%}" for row in run.bottlenecks.head(3).itertuples()]
        speed_up = run.samples_per_s / smallest.samples_per_s
        cells = [run.nodes, run.ranks, f"{run.samples_per_s:.1f}", f"{speed_up:.2f}", *shown, ", ".join(reasons) or "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def row(run: Measured, smallest: Measured) -> Row:
    """The same as numbers; the medians and minima are those of the run's steps."""
    causes = [{"cause": each.cause, "step_share": each.step_share} for each in run.bottlenecks.head(3).itertuples()]
    return {
        "nodes": run.nodes,
        "ranks": run.ranks,
        "steps": len(run.step_s),
        **summary(run.step_s, "s", "step"),
        "samples_per_s": run.samples_per_s,
        "speed_up": ratio(run.samples_per_s, smallest.samples_per_s),
        **{name: float(run.efficiency[name]) for name in (*FACTORS, *OF_REFERENCE)},
        "causes": causes,
    }


def percent(share: float) -> str:
    return "-" if pd.isna(share) else f"{share:.0%}"


if __name__ == "__main__":
    main()
