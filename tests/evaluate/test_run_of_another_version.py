"""A run whose configuration this version does not know is read by the code that the run keeps."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.launch.snapshot import take_snapshot
from hpcmm.runs.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "a run of $(id)")
    run.create()
    config_file.dump(compose_run(["cluster=local"]), run.config)
    run.config.write_text(run.config.read_text().replace("data:\n", "data:\n  dropped: 3\n"))
    return run


def test_the_command_that_is_told_reads_it(run: RunDir):
    take_snapshot(RunConfig(name="older"), run, None)
    with pytest.raises(HpcmmError, match=r"not a configuration of this version .*'dropped'") as refused:
        config_file.load(run.config)
    told = re.search(r"env .* python -P -m hpcmm.evaluate .*(?= \(or)", str(refused.value))
    assert told
    command = shlex.split(told[0])
    code = Path(command[1].removeprefix("PYTHONPATH="))
    assert command[-1] == str(run.root)
    source = code / "hpcmm" / "workloads" / "anomaly" / "schema.py"
    source.write_text(source.read_text().replace("class DataConfig:\n", "class DataConfig:\n    dropped: int = 0\n"))
    reads = (
        "import sys, pathlib as p; from hpcmm.config.config_file import load; "
        "print(load(p.Path(sys.argv[1])).data.dropped)"
    )
    shown = subprocess.run(
        [*command[:2], sys.executable, command[3], "-c", reads, str(run.config)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert shown.stdout == "3\n"


def test_without_kept_code_nothing_is_promised(run: RunDir):
    with pytest.raises(HpcmmError, match=r"'dropped'") as refused:
        config_file.load(run.config)
    assert "PYTHONPATH" not in str(refused.value)
