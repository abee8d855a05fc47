"""A job that Slurm took is noted whatever becomes of sbatch's answer and of the launch; no point is queued twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import cast

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.errors import HpcmmError
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import find_targets, take_over
from hpcmm.jobs.state import State, poller_of, states_of
from hpcmm.launch.plan import launch
from hpcmm.launch.submit import resubmit
from hpcmm.runs.ledger import read_ledger
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import identity_of
from hpcmm.slurm.commands import SilentError
from hpcmm.slurm.jobs import Job

pytestmark = pytest.mark.timeout(120)

SBATCH = """\
script= tasks=
for word; do case $word in --array=*) tasks=${word#--array=};; -*) ;; *) script=$word;; esac; done
n=$(($(cat count) + 1)); echo $n > count
number=$((10 + n))
echo "$number $tasks $script" >> sbatch.calls
id=$number; [ -z "$tasks" ] || id="${number}_[$tasks]"
printf '%s\\x1f' "$id" $number run me PENDING None $(date +%Y-%m-%dT%H:%M:%S) N/A N/A 0:00 "" 1 "$script" >> rows
echo $(id -u) >> rows
. ./answer
"""
LOST = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
SAID = "echo Submitted batch job $number"
SWEEP = ["parallel.threads_per_rank=range(1,5)"]


class Slurm:
    """A queue that keeps what sbatch is given; ``answer`` is a shell line: what sbatch does then."""

    def __init__(self, here: Path) -> None:
        self.here = here
        (here / "bin").mkdir()
        (here / "count").write_text("0")
        (here / "rows").touch()
        (here / "job.py").touch()
        for name, text in (("srun", "true"), ("sacct", "true"), ("scontrol", "echo MaxArraySize = 1001")):
            self.does(name, text)
        self.does("sbatch", SBATCH)
        self.does("squeue", "cat rows")
        self.does("scancel", "echo $* >> scancel.calls")
        self.answers(SAID)

    def does(self, name: str, text: str) -> None:
        script = f"#!/bin/bash\ncd {quote(str(self.here))}\n{text}\n"
        (self.here / "bin" / name).write_text(parted_as_asked(script))
        (self.here / "bin" / name).chmod(0o755)

    def answers(self, text: str) -> None:
        (self.here / "answer").write_text(f"{text}\n")

    @property
    def calls(self) -> list[str]:
        """Number and tasks of each job that was queued."""
        file = self.here / "sbatch.calls"
        return [line.rpartition(" ")[0].strip() for line in file.read_text().splitlines()] if file.exists() else []

    def launch(self, *overrides: str) -> subprocess.Popen[str]:
        words = ["cluster=slurm", "task=script", "task.path=job.py", "launch.snapshot=false", "name=v", *overrides]
        # As in a terminal: whoever starts the tests in the background has them ignore SIGINT.
        as_ever = "import signal, sys; [signal.signal(getattr(signal, f'SIG{each}'), signal.SIG_DFL) for each in "
        as_ever += "('HUP', 'QUIT', 'TERM')]; signal.signal(signal.SIGINT, signal.default_int_handler); "
        as_ever += "from hpcmm.launch.__main__ import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", as_ever, *words],
            cwd=self.here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def launched(self, *overrides: str) -> tuple[int, str, str]:
        process = self.launch(*overrides)
        said, complained = process.communicate(timeout=100)
        return process.returncode, said, complained


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name in ("SLURM_CONF", "SLURM_CLUSTERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return made


def the_run() -> Path:
    (run,) = [each for each in Path("runs").iterdir() if each.name.startswith("v-")]
    return run.resolve()


def jobs_of(sweep: Path) -> list[list[str]]:
    return [point.jobs for point in read_ledger(sweep).points]


def until(holds: Callable[[], bool]) -> None:
    """The time that a test may take bounds it."""
    while not holds():
        time.sleep(0.05)


def is_free(sweep: Path) -> bool:
    try:
        with read_ledger(sweep).locked():
            return True
    except HpcmmError:
        return False


def forget_the_job() -> Path:
    """As a launch leaves it that is killed before it can note sbatch's answer."""
    run = the_run()
    (run / "submission.json").unlink()
    ledger = run / "ledger.json"
    if ledger.exists():
        points = json.loads(ledger.read_text())["points"]
        ledger.write_text(json.dumps({"points": [point | {"jobs": []} for point in points]}))
    return run


@pytest.mark.few(4)
@pytest.mark.parametrize("signals", ["INT", "INT INT INT", "HUP", "TERM", "QUIT", "HUP TERM INT"])
def test_a_signal_while_sbatch_runs_waits_for_its_answer(slurm: Slurm, signals: str) -> None:
    slurm.answers(f"touch asked; until [ -e go ]; do sleep 0.05; done; {SAID}")
    process = slurm.launch(*SWEEP)
    while not (slurm.here / "asked").exists():
        assert process.poll() is None
        time.sleep(0.05)
    for name in signals.split():
        process.send_signal(getattr(signal, f"SIG{name}"))
    (slurm.here / "go").touch()
    _, complained = process.communicate(timeout=60)
    by_ctrl_c = "INT" in signals
    assert process.returncode == (130 if by_ctrl_c else -getattr(signal, f"SIG{signals.split(maxsplit=1)[0]}"))
    assert "what is submitted stays; to take it back: python -m hpcmm.jobs cancel 11" in complained
    assert jobs_of(the_run()) == [["11"]] * 4
    assert Path("runs/latest").resolve() == the_run()


def test_ctrl_c_while_the_accepted_job_is_looked_at_tells_its_number_and_leaves_it_as_the_latest(slurm: Slurm) -> None:
    (slurm.here / "runs").mkdir()
    slurm.does("squeue", "touch looked; exec sleep 60")
    process = slurm.launch()
    while not (slurm.here / "looked").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "to take it back: python -m hpcmm.jobs cancel 11" in complained
    assert Path("runs/latest").resolve() == the_run()


@pytest.mark.few(5)
@pytest.mark.parametrize("lost", [LOST, "kill -9 $$", "true", "echo 'Submitted batch job'; exit 3"])
@pytest.mark.parametrize("overrides", [[], SWEEP])
def test_a_job_whose_answer_was_lost_is_the_one_that_squeue_shows(
    slurm: Slurm, lost: str, overrides: list[str]
) -> None:
    slurm.answers(lost)
    status, said, complained = slurm.launched(*overrides)
    assert (status, len(slurm.calls)) == (0, 1), complained
    assert "job id:         11" in said
    assert "but squeue shows the job, 11." in complained
    assert identity_of(RunDir(the_run()), "11").uid == os.geteuid()


@pytest.mark.parametrize("squeue", ["true", "echo 'Unable to contact slurm controller' >&2; exit 1"])
def test_if_squeue_does_not_show_it_nobody_says_that_it_was_refused_and_it_is_found_later(
    slurm: Slurm, squeue: str
) -> None:
    slurm.does("squeue", squeue)
    slurm.answers(LOST)
    status, _, complained = slurm.launched()
    assert status == 1
    assert "the job may or may not be queued; squeue" in complained
    assert f"Before you launch again, see with python -m hpcmm.jobs status {the_run()}" in complained
    assert "refused" not in complained
    assert "launch again." not in complained
    slurm.does("squeue", "cat rows")
    assert [job.job_id for job in states_of(find_targets("v", Path("runs")))[0].jobs] == ["11"]
    assert identity_of(RunDir(the_run()), "11").name == "run"


def test_a_job_that_no_record_names_is_cancelled_by_its_run_s_name(slurm: Slurm) -> None:
    slurm.launched()
    forget_the_job()
    assert cancel("v", find_targets("v", Path("runs"))).ids == ["11"]
    assert (slurm.here / "scancel.calls").read_text() == "11\n"


@pytest.mark.parametrize("edit", [(f"\x1f{os.geteuid()}\n", "\x1f54321\n"), ("\x1f/", "\x1f/evil.sh /")])
def test_another_user_s_job_and_one_that_only_names_the_script_are_not_the_run_s(
    slurm: Slurm, edit: tuple[str, str]
) -> None:
    slurm.launched()
    forget_the_job()
    (slurm.here / "rows").write_text((slurm.here / "rows").read_text().replace(*edit))
    with pytest.raises(HpcmmError, match="Nothing to cancel"):
        cancel("v", find_targets("v", Path("runs")))
    assert not (slurm.here / "scancel.calls").exists()


def test_resubmit_queues_no_point_again_whose_job_no_record_names(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = forget_the_job()
    assert resubmit(sweep).job_ids == ()
    assert jobs_of(sweep) == [["11"]] * 4
    assert slurm.calls == ["11 0-3"]


def test_while_sbatch_waits_for_slurm_its_sweep_stays_locked_though_the_launch_was_killed(slurm: Slurm) -> None:
    waits = "i=0; touch asked; until [ -e go ] || [ $((i += 1)) -gt 1200 ]; do sleep 0.05; done"
    slurm.does("sbatch", f"{waits}\n{SBATCH}")
    process = slurm.launch(*SWEEP)
    until((slurm.here / "asked").exists)
    process.kill()
    process.communicate(timeout=60)
    with pytest.raises(HpcmmError, match="are being submitted by another launch: wait for it"):
        resubmit(the_run())
    assert slurm.calls == []
    (slurm.here / "go").touch()
    until(lambda: is_free(the_run()))
    assert resubmit(the_run()).job_ids == ()
    assert slurm.calls == ["11 0-3"]
    assert jobs_of(the_run()) == [["11"]] * 4


def test_points_that_ended_well_are_not_queued_again_though_squeue_has_forgotten_their_job(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = SweepDir(forget_the_job())
    for index in range(4):
        sweep.point(index).exit_status.write_text(f"11_{index} {3 if index == 2 else 0}\n")
    (slurm.here / "rows").write_text("")
    again = resubmit(sweep.root)
    assert [point.index for point in again.points] == [2]
    assert slurm.calls == ["11 0-3", "12 2"]


def test_points_of_a_resubmit_that_was_killed_count_by_their_newest_job_though_it_is_over(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = SweepDir(the_run())
    for index in range(4):
        point = sweep.point(index)
        point.exit_status.write_text(f"11_{index} 1\n12_{index} {1 if index == 3 else 0}\n")
        for number in (11, 12):
            (point.submitit / f"{number}_{index}_submitted.pkl").touch()
            os.utime(point.submitit / f"{number}_{index}_submitted.pkl", (number, number))
    (slurm.here / "rows").write_text("")
    assert jobs_of(sweep.root) == [["11"]] * 4
    assert [point.index for point in resubmit(sweep.root).points] == [3]


def test_an_array_of_a_resubmit_that_was_killed_is_shown_and_cancelled(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = SweepDir(the_run())
    for index in range(4):
        sweep.point(index).exit_status.write_text(f"11_{index} 1\n")
    (slurm.here / "rows").write_text("")
    slurm.answers("kill -9 $PPID")
    killed = subprocess.run(
        [sys.executable, "-m", "hpcmm.launch", "resubmit", str(sweep.root)],
        cwd=slurm.here, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    until(lambda: is_free(sweep.root))
    slurm.answers(SAID)
    assert jobs_of(sweep.root) == [["11"]] * 4
    (state,) = states_of(find_targets("v", Path("runs")))
    assert {job.job_id for job in state.active} == {"12_[0-3]"}
    assert jobs_of(sweep.root) == [["11", "12"]] * 4
    assert not sweep.may_lack_a_job
    assert cancel("v", find_targets("v", Path("runs")), 0).ids == ["12_[0-3]"]


def test_of_such_a_job_the_points_that_are_over_count_as_they_ended(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = forget_the_job()
    rows = slurm.here / "rows"
    rows.write_text(rows.read_text().replace("11_[0-3]", "11_[2-3]"))
    for index, status in ((0, 0), (1, 3)):
        point = SweepDir(sweep).point(index)
        (point.submitit / f"11_{index}_submitted.pkl").touch()
        point.exit_status.write_text(f"11_{index} {status}\n")
    assert [point.index for point in resubmit(sweep).points] == [1]
    assert jobs_of(sweep) == [["11"], ["11", "12"], ["11"], ["11"]]


def test_without_an_answer_of_squeue_nothing_is_submitted_again(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = forget_the_job()
    slurm.does("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SilentError):
        resubmit(sweep)
    assert slurm.calls == ["11 0-3"]


def test_ctrl_c_while_a_run_is_written_leaves_nothing_of_it(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm.here / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def trace(frame, event, _):\n"
        "    if frame.f_code.co_name == '_write_shared_files': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.setprofile(trace)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{slurm.here}{os.pathsep}{os.environ['PYTHONPATH']}")
    status, _, complained = slurm.launched(*SWEEP)
    assert status == 130, complained
    assert list(Path("runs").iterdir()) == []


def test_if_only_the_analysis_may_be_queued_the_run_is_said_to_be(slurm: Slurm) -> None:
    slurm.does("squeue", "true")
    slurm.answers(f"case $script in *analysis.sh) {LOST};; esac\n{SAID}")
    status, _, complained = slurm.launched("profile=nsys", "analyze=after")
    assert status == 1
    assert "Job 11 is submitted and stays, but its analysis may not be: " in complained
    assert "squeue --me" in complained
    assert "python -m hpcmm.jobs status" not in complained


def test_a_launch_from_within_the_handling_of_an_error_keeps_its_run(slurm: Slurm) -> None:
    try:
        raise ValueError("of the caller's")
    except ValueError:
        submission = launch(["cluster=slurm", "task=script", "task.path=job.py", "launch.snapshot=false", "name=v"])
    assert submission.run.submission_script.exists()


def forget_the_points() -> SweepDir:
    sweep = SweepDir(forget_the_job())
    assert jobs_of(sweep.root) == [[]] * 4
    return sweep


def test_a_status_locks_no_ledger_while_it_waits_for_squeue(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = forget_the_points()
    slurm.does("squeue", f"flock --nonblock {quote(str(sweep.lock))} true || touch was_locked; cat rows")
    assert [job.job_id for job in states_of(find_targets("v", Path("runs")))[0].jobs] == ["11_[0-3]"]
    assert jobs_of(sweep.root) == [["11"]] * 4
    assert not (slurm.here / "was_locked").exists()


def test_a_status_notes_nothing_while_a_launch_is_at_work_on_the_sweep(slurm: Slurm) -> None:
    slurm.launched(*SWEEP)
    sweep = forget_the_points()
    with read_ledger(sweep.root).locked():
        assert states_of(find_targets("v", Path("runs")))[0].jobs == []
        assert jobs_of(sweep.root) == [[]] * 4
    assert len(states_of(find_targets("v", Path("runs")))[0].jobs) == 1


def test_what_a_launch_notes_while_a_status_waits_for_squeue_stays(slurm: Slurm) -> None:
    slurm.launched()
    submission = the_run() / "submission.json"
    noted = json.loads(submission.read_text())
    noted |= {"analysis_job_id": "12", "jobs": noted["jobs"] | {"12": {"name": "run-analysis"}}}
    (slurm.here / "noted").write_text(json.dumps(noted))
    submission.unlink()
    slurm.does("squeue", f"cp noted {quote(str(submission))}; cat rows")
    states_of(find_targets("v", Path("runs")))
    assert json.loads(submission.read_text()) == noted


def test_the_analysis_that_is_noted_already_stays_when_another_job_is_taken_over(slurm: Slurm) -> None:
    slurm.launched()
    run = RunDir(the_run())
    run.submission.write_text('{"job_id": "9", "analysis_job_id": "10", "jobs": {"10": {"name": "run-analysis"}}}')
    assert take_over(run) == ["11"]
    record = json.loads(run.submission.read_text())
    assert (record["job_id"], record["analysis_job_id"], set(record["jobs"])) == ("11", "10", {"10", "11"})


def test_squeue_is_asked_once_for_all_runs_of_a_cluster_whose_job_no_record_names(slurm: Slurm) -> None:
    slurm.launched()
    first = forget_the_job()
    shutil.copytree(first, second := first.with_name("w-20260102-030405-1a2b"))
    slurm.does("squeue", "echo $* >> squeue.calls; cat rows")
    rows = slurm.here / "rows"
    rows.write_text(
        rows.read_text() + rows.read_text().replace("11\x1f11", "12\x1f12").replace(str(first), str(second))
    )
    states = states_of([*find_targets("v", Path("runs")), *find_targets("w", Path("runs"))])
    assert [[job.job_id for job in state.jobs] for state in states] == [["11"], ["12"]]
    asked = (slurm.here / "squeue.calls").read_text().splitlines()
    assert ["--user=" in each for each in asked] == [True, False]


def test_who_follows_a_sweep_looks_once_for_jobs_that_no_record_names(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.launched(*SWEEP)
    forget_the_points()
    asked_by_script = []

    def look(scripts: list[str], _: object) -> list[Job]:
        asked_by_script.append(scripts)
        if len(asked_by_script) == 1:
            raise SilentError("no controller", "squeue")
        return []

    monkeypatch.setattr("hpcmm.jobs.state.jobs_of_scripts", look)
    monkeypatch.setattr("hpcmm.jobs.state.Poller", lambda ask, *_, **__: ask)
    ask = cast(Callable[[], list[State]], poller_of(find_targets("v", Path("runs"))))
    with pytest.raises(SilentError):
        ask()
    for _ in range(3):  # after an answer it is not asked again
        assert ask()[0].jobs == []
    assert len(asked_by_script) == 2


def test_if_squeue_is_silent_a_status_says_so_and_nobody_that_there_is_nothing_to_cancel(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.launched()
    forget_the_job()
    slurm.does("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SilentError):
        cancel("v", find_targets("v", Path("runs")))
    assert states_of(find_targets("v", Path("runs")), needs_slurm=False)[0].jobs == []
    assert capsys.readouterr().err.startswith("hpcmm.jobs: Slurm does not answer (")
