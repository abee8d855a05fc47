"""The window of recorded steps, its flags, and what is known of a node's nsys."""

import os
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


def test_of_a_script_nobody_knows_the_last_step():
    assert step_window("1000:1010", None) == range(1000, 1010)
    with pytest.raises(HpcmmError, match="holds no step"):
        step_window("9:3", None)


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
    assert "it records nothing of nvtx" in facts.problem
    assert list((tmp_path / "cache").glob("*.json")) == []  # it is tried again next time


def test_a_broken_nsys_is_a_problem_and_no_traceback(tmp_path):
    broken = tmp_path / "nsys"
    broken.write_text("#!/bin/sh\necho libfoo.so: no such file >&2\nexit 127\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    assert "libfoo.so" in nsys_facts(str(broken), tmp_path / "cache").problem


OWN_STEPS = """
from hpcmm import annotate
for step in range(8):
    with annotate.step(step):
        pass
"""
AUTOMATIC_STEPS = """
from hpcmm.annotate.auto_instrument import annotate_program
annotate_program()
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(8):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""


@pytest.mark.nsys
@pytest.mark.parametrize(("training", "steps"), [(OWN_STEPS, "step"), (AUTOMATIC_STEPS, "step (automatic)")])
def test_a_window_s_report_holds_its_steps_under_their_own_numbers(nsys, facts, tmp_path, training, steps):
    from hpcmm.nsys.capture import run_under_nsys

    words, dropped = known_flags(profile_flags(profile("3:5"), None, nsys_flags_of(profile("3:5")), gpu=False), facts)
    assert dropped == []
    report, table = tmp_path / "rank_0000.nsys-rep", tmp_path / "table.sqlite"
    assert run_under_nsys([nsys, "profile", *words], [sys.executable, "-c", training], report) == 0
    subprocess.run([nsys, "export", "--type=sqlite", f"--output={table}", report], check=True, capture_output=True)
    with sqlite3.connect(table) as database:
        query = "SELECT int64Value FROM NVTX_EVENTS JOIN StringIds ON id = textId WHERE value = ? ORDER BY start"
        assert [number for (number,) in database.execute(query, (steps,))] == [3, 4]


def test_a_window_that_no_step_has_opened_is_told_at_the_end():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("NVTX")}
    environ |= {"NVTX_INJECTION64_PATH": "/none", "HPCMM_CAPTURE_STEPS": "30:40"}
    done = subprocess.run([sys.executable, "-c", OWN_STEPS], env=environ, capture_output=True, text=True, check=True)
    assert done.stderr == ("hpcmm: no step was recorded: profile.steps is 30:40, and this process' last step was 7.\n")
