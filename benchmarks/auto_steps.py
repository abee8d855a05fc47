"""Processor time that automatic steps and phases add to a training step: medians over fresh processes.

    python benchmarks/auto_steps.py [--runs 5] [--json FILE]

A step fetches a batch, and runs forward, backward and optimizer of a model of 100 modules. In each process blocks of
steps with all hooks alternate with blocks in which each hook returns at once; the difference of the shortest ones
counts, for other work of the machine only adds, after some blocks in which the hooks find the model. Without a profiler
nothing is installed. Exit status 1 if a step costs more than 100 us.
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
from pathlib import Path

import measuring
from measuring import Row, summary

BOUND_S = 100e-6
BLOCKS, STEPS = 20, 20
LAYERS = 50


def added_s() -> float:
    """Seconds of this process's processor time that the hooks add to one step."""
    os.environ.setdefault("NVTX_INJECTION64_PATH", "/none")
    from hpcmm.annotate import auto_instrument  # noqa: PLC0415

    auto_instrument.annotate_program()
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torch.randn(STEPS * 8, 8), batch_size=8)
    ranges = auto_instrument._ranges()
    own_thread = ranges._is_own_thread

    def block() -> float:
        began = time.thread_time()
        for batch in loader:
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.thread_time() - began) / STEPS

    for _ in range(3):
        block()
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * BLOCKS):
        hooked = number % 2 == 0
        ranges._is_own_thread = own_thread if hooked else lambda **_: False  # type: ignore[method-assign]
        times[hooked].append(block())
    return min(times[True]) - min(times[False])


def of_a_fresh_process(prefix: list[str]) -> float:
    command = [*prefix, sys.executable, "-W", "ignore", __file__, "--inside"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    said = next((line for line in done.stdout.splitlines() if line.startswith("added ")), None)
    if said is None:  # nsys' own status tells of its report, too
        sys.exit(f"{' '.join(command)} ended with status {done.returncode} and no number: {done.stderr[-500:]}")
    return float(said.split()[1])


def row(name: str, added: list[float]) -> Row:
    return {"name": name, "runs": len(added), **summary(added, "s", "added"), "bound_s": BOUND_S}


def main() -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--runs", type=measuring.positive, default=5)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print("added", added_s())
        return 0
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        prefixes: dict[str, list[str]] = {"hooks alone": []}
        if shutil.which("nsys"):
            traced = ["--trace=nvtx,osrt", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true"]
            prefixes["under nsys"] = ["nsys", "profile", *traced, f"--output={Path(folder) / 'report'}"]
        for name, prefix in prefixes.items():
            added = [of_a_fresh_process(prefix) for _ in range(options.runs)]
            median = statistics.median(added)
            print(f"{name}: {median * 1e6:.1f} us a step (median of {options.runs}, bound {BOUND_S * 1e6:.0f} us)")
            rows.append(row(name, added))
            worst = max(worst, median)
    measuring.write(options.json, "auto_steps", rows)
    return int(worst > BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
