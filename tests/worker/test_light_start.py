"""What runs before every rank costs every start, so it may load nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "deepspeed", "transformers", "pandas", "skimage", "hydra"}


@pytest.mark.parametrize(
    "module",
    [
        "hpcmm.worker.__main__",
        "hpcmm.worker.nsys_rank",
        "hpcmm.worker.prepare",
        "hpcmm.worker.task",
        "hpcmm.workloads.anomaly.workload",
    ],
)
def test_what_runs_before_the_ranks_loads_nothing_heavy(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    loaded = set(done.stdout.split())

    assert "hpcmm" in loaded
    assert not loaded & HEAVY


def test_a_port_is_found_with_the_standard_library() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hpcmm.worker", "port"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}

    assert 1024 < int(done.stdout) < 65536
    assert "hpcmm" in loaded
    assert not loaded & (HEAVY | {"yaml", "omegaconf", "numpy", "psutil", "rich"})
