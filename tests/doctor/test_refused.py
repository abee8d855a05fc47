"""Where Slurm gives the doctor no nodes: what it said, once, and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MUNGE = "srun: error: If munged is up, restart with --num-threads=10\nsrun: error: Munge encode failed: no socket\n"


def doctor(tmp_path: Path, *, says: str, configuration: bool = True) -> subprocess.CompletedProcess[str]:
    """The doctor beside a srun that says ``says`` and fails."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text(f"#!/bin/sh\nprintf '{says}' >&2\nexit 1\n")
    (commands / "srun").chmod(0o755)
    if configuration:
        (tmp_path / "slurm.conf").touch()
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_CONF": f"{tmp_path}/slurm.conf", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "hpcmm.doctor", "cluster=slurm", "--nodes", "3", "--no-nsys", "runs_root=."]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (2 * MUNGE, "=10; Munge encode failed: no socket. The cluster is not up, or munge is not running here"),
        ("srun: error: Node count specification invalid\n", "invalid. Asked for are 3 nodes"),
        ("srun: error: Something new.\n", "No node was checked: Something new."),
        ("", "No node was checked: srun said nothing."),
    ],
)
def test_what_slurm_said_is_told_once_with_its_remedy(tmp_path, says, told):
    done = doctor(tmp_path, says=says.replace("\n", "\\n"))
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.count("Munge encode failed") <= 1


def test_without_slurm_s_configuration_it_does_not_wait_for_it(tmp_path):
    done = doctor(tmp_path, says="", configuration=False)
    assert done.returncode == 1
    assert "which is not a file: is the cluster up" in done.stderr
