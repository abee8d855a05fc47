"""Makes what lies in a folder another user's, which takes root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

UID = 54321
"""Of nobody."""


def give(path: Path) -> Path:
    """``path``, and all in it, as files of another user. The test is skipped for who may not do that."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's files")
    for each in (path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())):
        os.chown(each, UID, UID, follow_symlinks=False)
    return path
