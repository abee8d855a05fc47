from pathlib import Path

import pytest


@pytest.fixture
def samples() -> Path:
    """Folder of the recorded reports."""
    return Path(__file__).parents[2] / "profiles" / "samples"
