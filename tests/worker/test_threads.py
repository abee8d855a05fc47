"""The threads of a rank's libraries are bounded if the user has not said otherwise."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from hpcmm.config.schema import ClusterConfig, ParallelConfig, RunConfig
from hpcmm.worker.environment import bound_threads, threads_per_rank

CONFIG = RunConfig(name="run", cluster=ClusterConfig(name="any", cpus_per_rank=6))


def test_a_rank_takes_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "restored afterwards")
    monkeypatch.delenv("OMP_NUM_THREADS")

    bound_threads(CONFIG)

    assert threads_per_rank(CONFIG) == 6
    assert os.environ["OMP_NUM_THREADS"] == "6"


def test_a_number_that_is_asked_for_goes_before_the_cores() -> None:
    assert threads_per_rank(replace(CONFIG, parallel=ParallelConfig(threads_per_rank=3))) == 3


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    bound_threads(CONFIG)

    assert os.environ["OMP_NUM_THREADS"] == "2"
