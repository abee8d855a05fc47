"""The half of a workload without torch: its defaults, and how a run's is found."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.schema import FUNCTION, SCRIPT, RunConfig, TaskConfig
from hpcmm.config.workload import Workload, workload_of


class Small(Workload):
    """Only what must be there."""

    def training_class(self):
        return Pair


class Pair(NamedTuple):
    """In place of a Training, which needs torch."""

    config: RunConfig
    device: str


def test_a_workload_needs_no_more_than_its_training():
    small, config = Small(), RunConfig()
    assert small.schema is RunConfig
    assert list(small.problems(config)) == []
    assert dict(small.given_paths(config)) == {}
    small.prepare(config)
    assert small.training(config, "cpu") == (config, "cpu")
    with pytest.raises(TypeError, match="training_class"):
        Workload()


def test_a_run_s_workload_follows_from_its_task():
    config = compose_run([])
    workload = workload_of(config)
    assert workload is not None
    assert type(workload).__name__ == "AnomalyWorkload"
    assert workload.schema is type(config)
    assert issubclass(workload.schema, RunConfig)
    for name in (SCRIPT, FUNCTION):
        assert workload_of(RunConfig(task=TaskConfig(name=name))) is None


def test_finding_it_loads_nothing_heavy():
    code = (
        "import sys; from hpcmm.config.workload import load_workload\n"
        "workload = load_workload('hpcmm.workloads.anomaly.workload.AnomalyWorkload')\n"
        "assert workload.given_paths(workload.schema())\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not set(done.stdout.split()) & {"torch", "deepspeed", "transformers", "pandas", "numpy", "PIL", "skimage"}
