"""A rank's metrics file over several attempts: whole lines, each step once."""

import json
import os
import resource
import signal

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.runs.metrics import MetricsWriter


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_resumed_run_holds_each_step_once_and_what_was_lost_stays_visible(tmp_path):
    path = tmp_path / "rank_0000.jsonl"
    with MetricsWriter(path, 1) as metrics:
        for step in range(6):
            metrics.step(step, loss=float(step))
    size = path.stat().st_size
    with MetricsWriter(path, 2) as metrics:
        metrics.resume(4)
        assert path.read_bytes()[:size].count(b"\n") == 6  # nobody who follows the file loses its place
        for step in range(4, 8):
            metrics.step(step, loss=float(step))
    found = records(path)
    assert [(r["step"], r["attempt"]) for r in found if r["event"] == "step"] == [
        *((step, 1) for step in range(4)), *((step, 2) for step in range(4, 8)),
    ]  # fmt: skip
    assert [r["step"] for r in found if r["event"] == "lost"] == [4, 5]


def test_half_a_line_that_a_killed_rank_left_is_dropped(tmp_path):
    path = tmp_path / "rank_0000.jsonl"
    path.write_text('{"event": "step", "step": 0}\n{"event": "st', encoding="utf-8")
    with MetricsWriter(path, 2) as metrics:
        metrics.step(1)
    assert [record["step"] for record in records(path)] == [0, 1]


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "rank_0000.jsonl"
    child = os.fork()
    if child == 0:  # a limit on the size of files ends a process' writes as a full disk does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            with MetricsWriter(path) as metrics:
                for step in range(100):
                    metrics.step(step)
        except HpcmmError as error:
            os._exit(0 if str(path) in str(error) and "last checkpoint" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert path.stat().st_size > 300
    assert [record["step"] for record in records(path)] == list(range(len(records(path))))


def test_a_file_that_cannot_be_made_is_said(tmp_path):
    with pytest.raises(HpcmmError, match="cannot be written"):
        MetricsWriter(tmp_path / "none" / "rank_0000.jsonl")
