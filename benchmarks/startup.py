"""From a Slurm job's start to the end of its first step: hpcmm beside `torchrun` by hand, same nodes, same training.

    python benchmarks/startup.py [--runs 5] [--json FILE] [KEY=VALUE ...]

Both jobs train the same configuration on the local cluster (slurm/local/up) and note their times in the same files. The
rival's script is what one writes by hand: one torchrun a node, which starts its ranks and lets them meet. The clock
starts with the first line of the job's script, and stops when the last rank has done its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measuring
import pandas as pd
from measuring import Row, ratio, summary

from hpcmm.analysis.time_tables import startup_table
from hpcmm.config import config_file
from hpcmm.config.sweep import compose_points
from hpcmm.launch.plan import Plan, plan
from hpcmm.launch.submit import submit
from hpcmm.launch.write import write
from hpcmm.runs.run_dir import RunDir

CONFIGURATION = ("experiment=anomaly_demo", "profile=off", "train.steps=2", "train.evaluate=false")

LAST_RUNS = {"hpcmm": "latest", "torchrun": "torchrun"}
"""What leads to each one's last run, in the folder of the runs."""

TORCHRUN_SCRIPT = """#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --gpus-per-node={gpus}
#SBATCH --time=10 --output={log}
echo "$EPOCHREALTIME" > {began}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task={cpus} {python} -m torch.distributed.run --nnodes={nodes} --nproc-per-node={ranks_per_node} \\
    --rdzv-backend=c10d --rdzv-endpoint="$head:29400" --rdzv-id="$SLURM_JOB_ID" {program} --rank-of={run}
"""


def begin(overrides: list[str], root: Path) -> Plan:
    given = [*CONFIGURATION, *overrides, f"runs_root={root}"]
    return plan(compose_points(given), given)


def with_hpcmm(overrides: list[str], root: Path) -> float:
    """Seconds from the script's start to the first step of all ranks."""
    planned = begin(overrides, root)
    write(planned)
    wait_for(submit(planned).job_id)
    began_s = json.loads(planned.run.attempts.read_text(encoding="utf-8"))["script_began_s"]
    return first_step_ended_s(planned.run) - began_s


def with_torchrun(overrides: list[str], root: Path) -> float:
    """The same of ranks that torchrun starts; ``root/torchrun`` then leads to its run directory."""
    planned = begin(overrides, root)
    config, run = planned.config, planned.run
    run.create()
    config_file.dump(config, run.config)
    os.environ.update(config.cluster.submit_environment)
    began, script = run.root / "began", run.root / "torchrun.sh"
    script.write_text(
        TORCHRUN_SCRIPT.format(
            nodes=config.cluster.nodes,
            ranks_per_node=config.cluster.ranks_per_node,
            cpus=config.cluster.cpus_per_rank * config.cluster.ranks_per_node,
            gpus=config.cluster.gpus_per_node,
            log=run.batch_log,
            began=began,
            python=sys.executable,
            program=Path(__file__).resolve(),
            run=run.root,
        ),
        encoding="utf-8",
    )
    done = subprocess.run(["sbatch", "--parsable", str(script)], check=True, capture_output=True, text=True)
    wait_for(done.stdout.strip())
    (root / "torchrun").unlink(missing_ok=True)
    (root / "torchrun").symlink_to(run.root.name)
    return first_step_ended_s(run) - float(began.read_text(encoding="ascii"))


def rank_under_torchrun(run_dir: str) -> None:
    """What a script for torchrun does: join the group from torchrun's variables, and train."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from hpcmm.node.cache import extensions_dir  # noqa: PLC0415
    from hpcmm.runs.metrics import MetricsWriter  # noqa: PLC0415
    from hpcmm.worker.compiled_ops import load_ops  # noqa: PLC0415
    from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415
    from hpcmm.worker.environment import RankEnvironment  # noqa: PLC0415

    run = RunDir(Path(run_dir))
    config = config_file.load(run.config)
    select_accelerator()
    load_ops(extensions_dir(config.cluster))
    import torch.distributed as dist  # noqa: PLC0415

    dist.init_process_group("gloo")
    import deepspeed  # noqa: PLC0415

    from hpcmm.train.loop import train  # noqa: PLC0415

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    variable = os.environ
    rank_env = RankEnvironment(
        rank=int(variable["RANK"]),
        local_rank=int(variable["LOCAL_RANK"]),
        world_size=int(variable["WORLD_SIZE"]),
        local_world_size=int(variable["LOCAL_WORLD_SIZE"]),
        job_id=variable["SLURM_JOB_ID"],
        node=variable["SLURMD_NODENAME"],
        master_addr=variable["MASTER_ADDR"],
        master_port=int(variable["MASTER_PORT"]),
    )
    import torch  # noqa: PLC0415

    torch.set_num_threads(config.cluster.cpus_per_rank)
    with MetricsWriter(run.rank_metrics(rank_env.rank)) as metrics:
        train(config, run, rank_env, torch.device("cpu"), metrics)
    dist.destroy_process_group()


def first_step_ended_s(run: RunDir) -> float:
    ended_ns = [
        record["unix_ns"]
        for records in metrics_of(run).values()
        for record in records
        if record["event"] == "step" and record["step"] == 0
    ]
    return max(ended_ns) / 1e9


def metrics_of(run: RunDir) -> dict[int, list[dict[str, object]]]:
    files = sorted(run.metrics.glob("rank_*.jsonl"))
    return {
        rank: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for rank, file in enumerate(files)
    }


def wait_for(job_id: str) -> None:
    """Until the job is over; its failure ends the benchmark."""
    while True:
        asked = ["squeue", "-h", "--states=all", "-j", job_id, "-o", "%T"]
        state = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        if state == "COMPLETED":
            return
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            sys.exit(f"job {job_id} ended as {state}")
        time.sleep(0.5)


def row(name: str, seconds: Sequence[float], rival_s: float, parts: pd.DataFrame) -> Row:
    """Until the first step's end: each run's time beside torchrun's median, and the parts of the last run."""
    median_s = statistics.median(seconds)
    return {
        "name": name,
        "runs": len(seconds),
        **summary(seconds, "s"),
        "each_s": list(seconds),
        "more_than_torchrun_s": median_s - rival_s,
        "times_torchrun": ratio(median_s, rival_s),
        "parts_of_last_run": parts.to_dict("records"),
    }


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--runs", type=measuring.positive, default=5)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.rank_of:
        rank_under_torchrun(options.rank_of)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with_hpcmm(options.overrides, root)  # compiles and makes what the first job on a machine has to
        pairs = [
            (with_hpcmm(options.overrides, root), with_torchrun(options.overrides, root)) for _ in range(options.runs)
        ]
        seconds = dict(zip(LAST_RUNS, zip(*pairs, strict=True), strict=True))
        ours, theirs = (statistics.median(values) for values in seconds.values())
        print(f"hpcmm:    {ours:.2f} s from the script's start to the end of the first step (median of {options.runs})")
        print(f"torchrun: {theirs:.2f} s")
        print(f"difference: {ours - theirs:+.2f} s (at most +1 s is the aim)")
        print(f"pairs: {', '.join(f'{mine:.1f} and {other:.1f}' for mine, other in pairs)}")
        rows = []
        for name, link in LAST_RUNS.items():
            parts = startup_table(metrics_of(RunDir((root / link).resolve())))
            print(f"the last run of {name}:")
            print(parts.to_string(index=False))
            rows.append(row(name, seconds[name], theirs, parts))
    measuring.write(options.json, "startup", rows)


if __name__ == "__main__":
    main()
