"""A pipeline trains a model to the losses and weights of one process, whatever its stages and parts.

Four ranks do all of it once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_cases import CHECKS, CORE, RANKS, check_core, check_named
from real_ranks import run_ranks

pytestmark = pytest.mark.usefixtures("compiled_ops")


def test_a_pipeline_trains_as_one_process_and_goes_on_from_its_checkpoint(tmp_path: Path):
    run_ranks(RANKS, check_core, str(tmp_path), timeout_s=240)


@pytest.mark.long
def test_a_pipeline_trains_as_one_process_in_all_its_forms():
    rest = [name for name in CHECKS if name not in CORE]
    assert len(rest) == len(CHECKS) - len(CORE)
    run_ranks(RANKS, check_named, rest, timeout_s=240)
