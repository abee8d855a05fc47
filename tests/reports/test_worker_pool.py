import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.reports import load
from hpcmm.reports.convert import Converter
from hpcmm.reports.find import ReportSource
from hpcmm.reports.load import WorkerDiedError, map_in_workers, read_all, worker_count


def test_results_come_in_order_from_other_processes() -> None:
    assert list(map_in_workers(abs, [-3, 2, -1], 2)) == [3, 2, 1]
    (pid, again) = map_in_workers(os.getpgid, [0, 0], 1)
    assert pid == again == os.getpgid(0)


def test_a_killed_worker_costs_only_its_own_task() -> None:
    results = list(map_in_workers(signal.raise_signal, [0, signal.SIGKILL, 0], 1))
    assert (results[0], results[2]) == (None, None)
    assert isinstance(results[1], WorkerDiedError)
    assert "memory ran out" in str(results[1])


def test_an_error_of_the_work_is_raised_here() -> None:
    with pytest.raises(FileNotFoundError):
        list(map_in_workers(os.stat, ["/", "/nowhere"], 2))


def test_who_wants_no_more_results_does_not_wait_for_them() -> None:
    threads = threading.active_count()
    results = map_in_workers(time.sleep, [0, 600, 600], 2)
    assert next(results) is None
    results.close()
    assert threading.active_count() == threads


def test_workers_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "cores", lambda: 64)
    monkeypatch.setattr(load, "available_bytes", lambda: 4 << 30)
    assert worker_count(1000, 100 << 20) == 5
    assert worker_count(3, 0) == 3
    assert worker_count(3, 100 << 30) == 1


def die(report) -> None:
    signal.raise_signal(signal.SIGKILL)


def test_a_report_whose_reader_is_killed_becomes_a_reason(
    export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SMALL_BYTES", 0)
    export.domains()
    (tmp_path / "x.sqlite").write_bytes(b"x" * 200)
    sources = [ReportSource((tmp_path / "x.sqlite",)), ReportSource((export.path,))]
    readings = list(read_all(sources, Converter(tmp_path / "cache", None), die, lambda *_: None, keep_cache=False))
    assert "not a readable SQLite export" in readings[0].reason
    assert "it was killed, most likely because the memory ran out" in readings[1].reason


def test_unfinished_exports_of_a_dead_worker_are_removed(tmp_path: Path) -> None:
    converter = Converter(tmp_path / "cache", None)
    (tmp_path / "cache" / f"export-{converter.owner}-x").mkdir(parents=True)
    (tmp_path / "cache" / "export-1-x").mkdir()
    converter.clear()
    assert [path.name for path in converter.cache.iterdir()] == ["export-1-x"]
    with pytest.raises(HpcmmError):
        converter.to_sqlite(ReportSource((tmp_path,)))
