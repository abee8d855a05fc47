"""When a rank is not started under a profiler, and when it is told to end, since another one has failed."""

import os

import another_user
import pytest

from hpcmm.config.schema import ProfileConfig, RunConfig
from hpcmm.errors import ProfilerUnusableError
from hpcmm.nsys.probe import NsysFacts
from hpcmm.runs import failures
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.nsys_rank import SomeRankFailed, run_profiled
from hpcmm.worker.task import RankSettings, nsys_flags_of


def test_a_rank_must_end_some_time_after_any_rank_has_left_a_record(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = RunDir(tmp_path)
    must_end = SomeRankFailed(run, kill_wait_s=20)
    assert not must_end()
    error = failures.RankError(3, "node1", 1, "ValueError", "no")
    failures.write(error, failures.error_file(failures.attempt_folder(run), 3))
    assert not must_end()
    now[0] += 4.9
    assert not must_end()
    now[0] += 0.2
    assert must_end()


@pytest.mark.parametrize("kind", ["pipe", "folder", "another user's", "own"])
def test_settings_of_nsys_that_others_left_in_the_rank_s_folder_keep_it_from_being_used(tmp_path, monkeypatch, kind):
    folder, settings = tmp_path / "shared", tmp_path / "shared" / "config.ini"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))
    if kind == "pipe":
        os.mkfifo(settings)
    elif kind == "folder":
        settings.mkdir()
    else:
        settings.touch()
    if kind == "another user's":
        another_user.give(settings)
    monkeypatch.setattr("shutil.which", lambda _: "/bin/false")
    facts = NsysFacts("2022.4", (), None)
    monkeypatch.setattr("hpcmm.worker.nsys_rank.nsys_facts", lambda *_: facts)
    ran = []
    monkeypatch.setattr("hpcmm.worker.nsys_rank.run_under_nsys", lambda *_, **__: ran.append(1) or 0)
    run = RunDir(tmp_path / "run")
    run.create()
    config = RunConfig(profile=ProfileConfig(tool="nsys", flags_file="timeline.yaml"))
    if kind == "own":
        assert run_profiled(RankSettings(config, nsys_flags_of(config.profile)), run, 0, ["true"]) == 0
    else:
        with pytest.raises(ProfilerUnusableError, match=r"nsys would read .*shared/config\.ini"):
            run_profiled(RankSettings(config, nsys_flags_of(config.profile)), run, 0, ["true"])
    assert ran == ([1] if kind == "own" else [])
