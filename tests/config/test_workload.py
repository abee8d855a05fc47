"""The half of a workload without torch: its defaults, and how a run's is found."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest

from hpcmm.config.schema import FUNCTION, SCRIPT, RunConfig, TaskConfig
from hpcmm.config.workload import Workload, workload_of
from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.schema import AnomalyConfig, ModelConfig


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
    assert small.evaluation() is None
    assert small.served() is None
    assert small.training(config, "cpu") == (config, "cpu")
    with pytest.raises(TypeError, match="training_class"):
        Workload()


def test_a_run_s_workload_follows_from_its_task():
    config = AnomalyConfig(model=ModelConfig(decoder="mlp"))
    workload = workload_of(config)
    assert workload is not None
    assert issubclass(AnomalyConfig, workload.schema)
    for name in (SCRIPT, FUNCTION):
        assert workload_of(RunConfig(task=TaskConfig(name=name))) is None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("os.system", "os.system is not a class"),
        ("pathlib.Path", "must be a subclass of hpcmm.config.workload.Workload"),
        ("hpcmm.nowhere.Workload", "cannot be imported"),
        ("Workload", "cannot be imported"),
    ],
)
def test_what_is_not_a_workload_is_refused(target: str, said: str):
    with pytest.raises(HpcmmError, match=said):
        workload_of(RunConfig(task=TaskConfig("other", target)))


def test_finding_it_loads_nothing_heavy():
    code = (
        "import sys; from hpcmm.workloads.anomaly.schema import AnomalyConfig; "
        "from hpcmm.config.workload import workload_of\n"
        "assert workload_of(AnomalyConfig()).given_paths(AnomalyConfig())\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not set(done.stdout.split()) & {"torch", "deepspeed", "transformers", "pandas", "numpy", "PIL", "skimage"}
