"""The Pythons of this machine that ranks may run on, beside the one that runs the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def python_of(version: str) -> str:
    """A Python of this version, from pyenv or the PATH, without packages of anybody's; skips the test if there is none.

    The test's own environment counts for nothing: it has all that hpcmm needs.
    """
    home = Path(os.environ.get("PYENV_ROOT", f"{pwd.getpwuid(os.getuid()).pw_dir}/.pyenv"))  # tests have another HOME
    found = sorted(home.glob(f"versions/{version}.*/bin/python"))
    on_path = shutil.which(f"python{version}", path=os.environ.get("PATH"))
    for python in [*map(str, found), *([on_path] if on_path else [])]:
        asked = [python, "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return python
    pytest.skip(f"this machine has no Python {version}, neither pyenv's nor on the PATH")
