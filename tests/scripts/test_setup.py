"""``scripts/setup.sh`` harms nothing that is not its own."""

import os
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_packages_of_another_checkout_are_not_emptied_through_a_link(tmp_path, monkeypatch):
    checkout, other = tmp_path / "checkout", tmp_path / "other"
    (checkout / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "setup.sh", checkout / "scripts")
    (checkout / "scripts" / "system_packages.sh").write_text("#!/bin/sh\n")
    (checkout / "scripts" / "system_packages.sh").chmod(0o755)
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "activate").touch()
    (checkout / ".venv").symlink_to(other)
    command = [checkout / "scripts" / "setup.sh"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to("/bin/false")  # what Python lacks is not asked for first
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"setup: .venv is a link to {other}")
    assert (other / "bin" / "activate").exists()
