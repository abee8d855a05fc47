"""What annotation adds to a training step of 20 ms, without a profiler and under nsys: medians over fresh processes.

    python benchmarks/annotate.py [--runs 5] [--json FILE]

A step is the step range, four phases and four gloo all-reduces, of one process, so that nothing waits. In each process
the medians of many steps without annotation and of many with it are compared. Under nsys, with the flags of
profiles/nsys/timeline.yaml, both kinds of steps run under it. Exit status 1 when a bound is exceeded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import measuring
from measuring import Row, summary

STEP_S = 0.020
BOUNDS = {"without a profiler": 0.005, "under nsys": 0.02}
STEPS = 400
COLLECTIVES = 4
PHASES = ("data", "forward", "backward", "optimizer")


def added_s() -> float:
    """Seconds that annotation adds to one step of this process."""
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    from hpcmm import annotate  # noqa: PLC0415
    from hpcmm.annotate import collectives  # noqa: PLC0415
    from hpcmm.annotate.ranges import profiler_attached  # noqa: PLC0415
    from hpcmm.worker.distributed import leave_group  # noqa: PLC0415

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    tensor = torch.zeros(1000)

    def step(number: int, *, annotated: bool) -> float:
        began = time.perf_counter()
        with annotate.step(number) if annotated else nullcontext():
            for phase in PHASES:
                with annotate.phase(phase) if annotated else nullcontext():
                    pass
            for _ in range(COLLECTIVES):
                dist.all_reduce(tensor)
        return time.perf_counter() - began

    for number in range(100):
        step(number, annotated=number % 2 == 0)
    if not profiler_attached():  # nothing is installed then, so both kinds of steps can alternate
        collectives.install()
        pairs = [(step(number, annotated=False), step(number, annotated=True)) for number in range(STEPS)]
        bare, annotated = (statistics.median(times) for times in zip(*pairs, strict=True))
    else:
        bare = statistics.median(step(number, annotated=False) for number in range(STEPS))
        collectives.install()
        annotated = statistics.median(step(number, annotated=True) for number in range(STEPS))
    leave_group()
    return annotated - bare


def of_a_fresh_process(prefix: list[str]) -> float:
    command = [*prefix, sys.executable, __file__, "--inside"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("added ")).split()[1])


def nsys_prefix(folder: Path) -> list[str]:
    from hpcmm.config.schema import ProfileConfig  # noqa: PLC0415
    from hpcmm.worker.nsys_rank import profile_flags  # noqa: PLC0415
    from hpcmm.worker.task import nsys_flags_of  # noqa: PLC0415

    profile = ProfileConfig(tool="nsys", flags_file="timeline.yaml")
    flags = profile_flags(profile, STEPS, nsys_flags_of(profile), gpu=False)
    words = [f"--{name}={value}" for name, value in flags.items()]
    return ["nsys", "profile", *words, "--force-overwrite=true", f"--output={folder / 'report'}"]


def row(name: str, added: list[float]) -> Row:
    """What each process's annotation added to a step, and the median's share of a step of 20 ms."""
    found = {"name": name, "runs": len(added), **summary(added, "s", "added"), "step_s": STEP_S}
    return {**found, "share_of_step": statistics.median(added) / STEP_S, "bound_of_share": BOUNDS[name]}


def main() -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--runs", type=measuring.positive, default=5)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print("added", added_s())
        return 0
    worst, rows = 0, []
    with tempfile.TemporaryDirectory() as folder:
        prefixes = {"without a profiler": []}
        if shutil.which("nsys"):
            prefixes["under nsys"] = nsys_prefix(Path(folder))
        for name, prefix in prefixes.items():
            all_added = [of_a_fresh_process(prefix) for _ in range(options.runs)]
            added = statistics.median(all_added)
            share, bound = added / STEP_S, BOUNDS[name]
            said = f"{added * 1e6:.1f} us a step, {share:.3%} of 20 ms"
            print(f"{name}: {said} (median of {options.runs}, bound {bound:.1%})")
            rows.append(row(name, all_added))
            worst |= share > bound
    measuring.write(options.json, "annotate", rows)
    return worst


if __name__ == "__main__":
    sys.exit(main())
