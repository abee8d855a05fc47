"""A pipeline trains a model to the losses and weights of one process, whatever its stages and parts.

Four ranks do all of it once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_cases import CHECKS, RANKS, check_all
from real_ranks import run_ranks


@pytest.mark.usefixtures("compiled_ops")
def test_a_pipeline_trains_as_one_process(tmp_path: Path):
    run_ranks(RANKS, check_all, str(tmp_path), timeout_s=240)
    assert CHECKS
