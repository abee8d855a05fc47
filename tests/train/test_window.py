"""The window of recorded steps, its flags, and what is known of a node's nsys."""

import sqlite3
import stat
import subprocess
import sys

import pytest

from hpcmm.config.schema import ProfileConfig
from hpcmm.errors import HpcmmError
from hpcmm.nsys.probe import NsysFacts, nsys_facts
from hpcmm.ranges import step_window
from hpcmm.worker.nsys_rank import known_flags, profile_flags
from hpcmm.worker.task import nsys_flags_of

WINDOW_FLAGS = {"capture-range", "nvtx-capture", "capture-range-end", "env-var"}


def profile(steps=None):
    return ProfileConfig(tool="nsys", flags_file="timeline.yaml", steps=steps)


@pytest.mark.parametrize(("choice", "window"), [("100:110", range(100, 110)), (" 0 : 1 ", range(1)), (None, None)])
def test_windows(choice, window):
    assert step_window(choice, 200) == window


@pytest.mark.parametrize("choice", ["", "5", "5:5", "9:3", "-1:3", "200:210", "a:b", "1:2:3", "1-2"])
def test_a_window_that_cannot_be_met_is_refused(choice):
    with pytest.raises(HpcmmError, match=r"profile\.steps is"):
        step_window(choice, 200)


def test_cuda_is_traced_only_where_there_is_a_gpu():
    assert profile_flags(profile(), 10, nsys_flags_of(profile()), gpu=False)["trace"] == "nvtx,osrt"
    assert profile_flags(profile(), 10, nsys_flags_of(profile()), gpu=True)["trace"] == "nvtx,osrt,cuda"


def test_only_a_window_adds_the_flags_of_one():
    assert not WINDOW_FLAGS & profile_flags(profile(), 10, nsys_flags_of(profile()), gpu=False).keys()
    assert profile_flags(profile("2:4"), 10, nsys_flags_of(profile("2:4")), gpu=False).keys() >= WINDOW_FLAGS


def test_flags_that_this_nsys_does_not_know_are_dropped_by_name():
    facts = NsysFacts("nsys 1", ("trace", "sample"), None)
    words, dropped = known_flags({"trace": "nvtx", "cuda-event-trace": "false", "sample": "none"}, facts)
    assert words == ["--trace=nvtx", "--sample=none"]
    assert dropped == ["--cuda-event-trace"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def facts(nsys, cache):
    return nsys_facts(nsys, cache)


@pytest.mark.nsys
def test_the_installed_nsys_records_ranges_and_is_asked_once(nsys, facts, cache, monkeypatch):
    assert facts.problem is None
    assert {"trace", "sample", "capture-range", "nvtx-capture", "capture-range-end"} <= set(facts.flags)
    monkeypatch.setattr(subprocess, "run", None)  # the second answer starts no process
    monkeypatch.setattr(subprocess, "Popen", None)
    assert nsys_facts(nsys, cache) == facts


@pytest.mark.nsys
def test_an_nvtx_that_records_nothing_is_found(nsys, tmp_path, monkeypatch):
    # As newer versions of the package do under this nsys: the calls are there, and do nothing.
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "nvtx.py").write_text(
        "import contextlib\nannotate = lambda *a, **k: contextlib.nullcontext()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "silent"))
    facts = nsys_facts(nsys, tmp_path / "cache")
    assert "records no NVTX ranges" in facts.problem
    assert list((tmp_path / "cache").glob("*.json")) == []  # it is tried again next time


def test_a_broken_nsys_is_a_problem_and_no_traceback(tmp_path):
    broken = tmp_path / "nsys"
    broken.write_text("#!/bin/sh\necho libfoo.so: no such file >&2\nexit 127\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    assert "libfoo.so" in nsys_facts(str(broken), tmp_path / "cache").problem


TRAINING = """
from hpcmm import annotate
from hpcmm.annotate.ranges import CaptureWindow
with CaptureWindow(range(3, 5)) as window:
    for step in range(8):
        window.before(step)
        with annotate.step(step):
            pass
"""


@pytest.mark.nsys
def test_a_window_s_report_holds_its_steps_under_their_own_numbers(nsys, facts, tmp_path):
    from hpcmm.nsys.capture import run_under_nsys

    words, dropped = known_flags(profile_flags(profile("3:5"), 8, nsys_flags_of(profile("3:5")), gpu=False), facts)
    assert dropped == []
    report, table = tmp_path / "rank_0000.nsys-rep", tmp_path / "table.sqlite"
    assert run_under_nsys([nsys, "profile", *words], [sys.executable, "-c", TRAINING], report) == 0
    subprocess.run([nsys, "export", "--type=sqlite", f"--output={table}", report], check=True, capture_output=True)
    with sqlite3.connect(table) as database:
        query = "SELECT int64Value FROM NVTX_EVENTS JOIN StringIds ON id = textId WHERE value = 'step' ORDER BY start"
        assert [number for (number,) in database.execute(query)] == [3, 4]
