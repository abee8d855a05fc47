from pathlib import Path

import pytest
from recorded import H100
from synthetic_gpu import GpuRun

from hpcmm.analyze import Analysis, analyze


@pytest.fixture
def samples() -> Path:
    """Folder of the recorded reports."""
    return Path(__file__).parents[2] / "profiles" / "samples"


@pytest.fixture(scope="session")
def gpu_run(tmp_path_factory) -> Analysis:
    """An annotated run of two nodes of two GPUs. Synthetic."""
    folder = tmp_path_factory.mktemp("gpu_run")
    return analyze([GpuRun().write(folder / "run")], folder / "out")


@pytest.fixture(scope="session")
def h100(tmp_path_factory) -> Analysis:
    """The recorded report of two H100s."""
    return analyze([H100], tmp_path_factory.mktemp("h100"))
