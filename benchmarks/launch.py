"""How long `python -m hpcmm.launch` takes until it calls sbatch: medians over fresh processes.

    python benchmarks/launch.py [--runs 5]

A stand-in sbatch on the PATH notes when it is called; no job is submitted. The import of hydra and submitit alone,
which no launcher of this kind can do without, is measured beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SBATCH = """#!/bin/sh
date +%s.%N > "$HPCMM_BENCHMARK_CALLED"
echo "Submitted batch job 1"
"""


def seconds_to_sbatch(folder: Path) -> float:
    """From the start of the process to the start of sbatch."""
    called = folder / "called"
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HPCMM_BENCHMARK_CALLED": str(called)}
    began = time.time()
    command = [sys.executable, "-m", "hpcmm.launch", "experiment=anomaly_demo", f"runs_root={folder / 'runs'}"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return float(called.read_text(encoding="ascii")) - began


def seconds_to_import() -> float:
    began = time.time()
    subprocess.run([sys.executable, "-c", "import hydra, submitit"], check=True)
    return time.time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        binaries = Path(folder) / "bin"
        binaries.mkdir()
        for name in ("sbatch", "srun"):
            (binaries / name).write_text(SBATCH, encoding="ascii")
            (binaries / name).chmod(0o755)
        pairs = [(seconds_to_sbatch(Path(folder)), seconds_to_import()) for _ in range(runs + 1)][1:]
    launched, imported = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(f"until sbatch is called: {launched:.3f} s (median of {runs})")
    print(f"import hydra, submitit: {imported:.3f} s (median of {runs})")
    print(f"ratio: {launched / imported:.2f}")


if __name__ == "__main__":
    main()
