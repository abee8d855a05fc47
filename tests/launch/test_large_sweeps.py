"""A sweep that one job array cannot hold is several, with one ledger."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import find_targets
from hpcmm.launch.__main__ import main
from hpcmm.launch.plan import job_to_wait_for, launch
from hpcmm.launch.script import Job, arrays_of, parallel_shares, render_analysis_script, render_script
from hpcmm.launch.submit import resubmit
from hpcmm.runs.ledger import read_ledger
from hpcmm.runs.run_dir import RunDir, SweepDir

SQUEUE = "\x1f".join(["{}", "{}", "demo", "", "{}", "None", *["N/A"] * 3, "0:10", "n1", "1", "{}"])
"""A row of squeue's: number, raw number, state, command."""
SBATCH = """\
#!/bin/sh
n=$(($(cat "{here}/count") + 1)); echo $n > "{here}/count"
echo "$@" >> "{here}/sbatch.calls"
case " {refused} " in *" $n "*) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1;; esac
echo Submitted batch job $((10 + n))
"""


class Slurm:
    """Stand-ins for Slurm's commands on a cluster with a small MaxArraySize."""

    def __init__(self, here: Path) -> None:
        self.here = here
        (here / "bin").mkdir()
        for name in ("srun", "squeue", "sacct"):
            self.write(name, parted_as_asked("#!/bin/sh\n"))
        self.allows(12)
        self.refuses()

    def write(self, name: str, text: str) -> None:
        (self.here / "bin" / name).write_text(text)
        (self.here / "bin" / name).chmod(0o755)

    def allows(self, tasks: int) -> None:
        self.write("scontrol", f"#!/bin/sh\necho 'MaxArraySize            = {tasks}'\n")

    def refuses(self, *calls: int) -> None:
        """These calls of sbatch, counted from 1 on."""
        (self.here / "count").write_text("0")
        (self.here / "sbatch.calls").write_text("")
        self.write("sbatch", SBATCH.format(here=self.here, refused=" ".join(map(str, calls))))

    def queues(self, sweep: SweepDir, rows: list[tuple[str, str, str]]) -> None:
        """What squeue tells of the sweep's tasks; array 11 is its first one, and its other arrays follow."""
        scripts = {"11": sweep.submission_script(0), "13": sweep.submission_script(20)}
        lines = [SQUEUE.format(*row, scripts.get(row[0].split("_")[0], sweep.submission_script(10))) for row in rows]
        (self.here / "rows").write_text("".join(f"{line}\n" for line in lines))
        self.write("squeue", parted_as_asked(f"#!/bin/sh\ncat {self.here}/rows\n"))

    def submitted(self) -> list[list[str]]:
        return [line.split() for line in (self.here / "sbatch.calls").read_text().splitlines()]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.chdir(tmp_path)
    return made


SWEEP = ("cluster=slurm", "launch.snapshot=false", "task=function", "task.target=a:b")


def sweep_of(points: int, *overrides: str) -> list[str]:
    return [*SWEEP, f"task.kwargs.seed=range(0,{points})", *overrides]


def jobs_of(sweep: SweepDir) -> list[list[str]]:
    return [point.jobs for point in read_ledger(sweep.root).points]


def test_a_sweep_that_fits_is_one_array_up_to_the_last_task(slurm: Slurm) -> None:
    submission = launch(sweep_of(12))
    assert [words[0] for words in slurm.submitted()] == ["--array=0-11"]
    assert jobs_of(SweepDir(submission.run.root)) == [["11"]] * 12


def test_a_larger_one_is_several_arrays_of_a_power_of_ten_with_one_ledger(slurm: Slurm) -> None:
    submission = launch(sweep_of(23))
    sweep = SweepDir(submission.run.root)
    assert [(words[0], Path(words[1]).name) for words in slurm.submitted()] == [
        ("--array=0-9", "submission.sh"), ("--array=0-9", "submission_10.sh"), ("--array=0-2", "submission_20.sh"),
    ]  # fmt: skip
    assert submission.array_ids == ("11", "12", "13")
    expected = [*(f"11_{n}" for n in range(10)), *(f"12_{n}" for n in range(10)), *(f"13_{n}" for n in range(3))]
    assert [job.job_id for job in submission.jobs] == expected
    assert jobs_of(sweep) == [[job.removesuffix(f"_{i}") if i < 10 else job] for i, job in enumerate(expected)]
    (target,) = find_targets("latest", Path("runs"))
    assert list(target.tasks) == expected
    assert target.job_ids == ("11", "12", "13")
    assert find_targets("12_3", Path("runs"))[0].run == sweep.point(13)
    assert job_to_wait_for("latest", Path("runs")) == "11:12:13"
    assert job_to_wait_for(str(sweep.point(13).root), Path("runs")) == "12_3"


def test_each_task_finds_its_point_and_writes_its_log_there(tmp_path: Path) -> None:
    config = compose_run(["cluster=slurm"])
    for points, most_tasks in ((23, 12), (2500, 1001), (150, 100), (30_000, 10_001), (12, 5)):
        arrays = arrays_of(Job(RunDir(tmp_path), points=points), most_tasks, None)
        found = []
        for array in arrays:
            assert array.points is not None
            assert array.points <= most_tasks
            for task in {0, 1, array.points - 1} if array.points > 1 else {0}:
                script = render_script(config, array)
                point = SweepDir(tmp_path).point(array.first + task).root
                assert str(point) == point_of(script, task)
                assert point_of(render_analysis_script(config, array), task) == str(point)
                assert log_of(script, task) == str(RunDir(point).batch_log)
            found += range(array.first, array.first + array.points)
        assert found == list(range(points))


def point_of(script: str, task: int) -> str:
    """The run directory that the script's own line makes."""
    line = next(line for line in script.splitlines() if line.startswith("run_dir="))
    environ = {"SLURM_ARRAY_TASK_ID": str(task), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", f"{line}; echo $run_dir"], env=environ, text=True, capture_output=True, check=True
    )
    return done.stdout.strip()


def log_of(script: str, task: int) -> str:
    """Where Slurm writes the log of a task."""
    pattern = next(line.partition("--output=")[2] for line in script.splitlines() if "--output=" in line)
    before, percent, after = pattern.partition("%")
    return before + (f"{task:0{after[0]}d}" + after[2:] if percent else "")


def test_a_refused_array_leaves_those_before_it_and_the_sentence_says_how_to_go_on(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.refuses(2)
    assert main(sweep_of(23)) == 1
    said = capsys.readouterr().err
    sweep = SweepDir(Path("runs/latest").resolve())
    assert "10 of 23 points are submitted and stay, in job 11; points 10-22 are not." in said
    assert "QOSMaxSubmitJobPerUserLimit" in said
    assert f"To submit what is left: python -m hpcmm.launch resubmit {sweep.root}" in said
    assert jobs_of(sweep) == [["11"]] * 10 + [[]] * 13
    slurm.refuses()
    slurm.queues(sweep, [(f"11_{n}", "11", "PENDING") for n in range(10)])
    again = resubmit(sweep.root)
    assert again.job_ids == ("11", "12")
    assert [words[0] for words in slurm.submitted()] == ["--array=0-9", "--array=0-2"]
    assert jobs_of(sweep)[9:11] == [["11"], ["11_0"]]


def test_a_sweep_whose_first_array_is_refused_leaves_nothing(slurm: Slurm) -> None:
    slurm.refuses(1)
    with pytest.raises(HpcmmError, match="QOSMaxSubmitJobPerUserLimit"):
        launch(sweep_of(23))
    assert list(Path("runs").iterdir()) == []


def test_points_beyond_the_first_array_are_submitted_once_more_in_their_own(slurm: Slurm) -> None:
    sweep = SweepDir(launch(sweep_of(23)).run.root)
    for index in range(23):
        task = f"11_{index}" if index < 10 else f"{11 + index // 10}_{index % 10}"
        status = 1 if index in {3, 14, 15, 22} else 0
        sweep.point(index).exit_status.write_text(f"{task} {status}\n")
    slurm.refuses()
    again = resubmit(sweep.root)
    assert [point.index for point in again.points] == [3, 14, 15, 22]
    assert [(words[0], Path(words[1]).name) for words in slurm.submitted()] == [
        ("--array=3", "submission.sh"), ("--array=4-5", "submission_10.sh"), ("--array=2", "submission_20.sh"),
    ]  # fmt: skip
    assert [jobs_of(sweep)[index][-1] for index in (3, 14, 15, 22)] == ["11", "12_4", "12_5", "13_2"]


def test_each_array_s_analysis_waits_for_its_own_array(slurm: Slurm) -> None:
    launch(sweep_of(13, "profile=nsys", "analyze=after"))
    assert [(Path(words[-1]).name, words[:-1]) for words in slurm.submitted()] == [
        ("submission.sh", ["--array=0-9"]),
        ("analysis.sh", ["--array=0-9", "--dependency=aftercorr:11"]),
        ("submission_10.sh", ["--array=0-2"]),
        ("analysis_10.sh", ["--array=0-2", "--dependency=aftercorr:13"]),
    ]


def test_the_points_that_may_run_at_once_are_shared_by_the_arrays(slurm: Slurm) -> None:
    launch(sweep_of(23, "launch.parallel_points=5"))
    assert [words[0] for words in slurm.submitted()] == ["--array=0-9%2", "--array=0-9%2", "--array=0-2%1"]
    assert parallel_shares(2, 3) == [1, 1, 1]
    assert parallel_shares(None, 2) == [None, None]


def test_more_arrays_than_anybody_wants_and_none_at_all_are_refused(slurm: Slurm) -> None:
    slurm.allows(9)
    with pytest.raises(HpcmmError, match=r"would be 101 job arrays, .* 9 tasks here \(MaxArraySize\)"):
        launch(sweep_of(101))
    slurm.allows(0)
    with pytest.raises(HpcmmError, match="takes no job arrays"):
        launch(sweep_of(2))


def test_a_ledger_of_an_earlier_version_names_arrays_alone(tmp_path: Path) -> None:
    points = [{"index": i, "overrides": [], "run": f"{i:04d}", "jobs": ["7", "9"][: i + 1]} for i in range(2)]
    (tmp_path / "ledger.json").write_text(json.dumps({"points": points}))
    ledger = read_ledger(tmp_path)
    assert [point.job_id for point in ledger.points] == ["7_0", "9_1"]
    assert ledger.newest_arrays() == {"7", "9"}


def test_a_run_after_a_sweep_waits_for_all_of_its_points_and_for_no_job_that_they_had_before(slurm: Slurm) -> None:
    sweep = SweepDir(launch(sweep_of(13, "name=first")).run.root)
    rows = [
        ("11_[0-9]", "11", "PENDING"),
        ("12_0", "20", "RUNNING"),
        ("12_1", "21", "COMPLETED"),
        ("12_2", "12", "RUNNING"),
    ]
    slurm.queues(sweep, rows)
    assert dependency("after=first") == "afterok:11:12"
    assert dependency(f"after={sweep.root.name}/0010") == "afterok:12_0"
    ledger = read_ledger(sweep.root)
    ledger.note_array("15", ledger.points[11:12], 10)
    slurm.queues(sweep, [*rows, ("15_1", "15", "PENDING")])
    assert dependency("after=first") == "afterok:11:12_0:15:12_2"
    slurm.queues(sweep, [rows[0], ("12_0", "20", "FAILED"), *rows[2:], ("15_1", "15", "PENDING")])
    with pytest.raises(HpcmmError, match="after=first: 12_0 ended as FAILED, so a job after it would never start"):
        dependency("after=first")
    done = [(f"11_{n}", f"11{n}", "COMPLETED") for n in range(10)]
    slurm.queues(sweep, [*done, *((task, "20", "COMPLETED") for task in ("12_0", "15_1", "12_2"))])
    assert dependency("after=first") is None


def dependency(after: str) -> str | None:
    """What the script of a run after these jobs tells Slurm."""
    script = launch([*SWEEP, "name=second", after]).run.submission_script.read_text()
    return next((line.partition("=")[2] for line in script.splitlines() if "--dependency" in line), None)


def test_a_sweep_is_no_run_to_start_from_but_its_point_is(slurm: Slurm) -> None:
    sweep = SweepDir(launch(sweep_of(2, "name=first")).run.root)
    sweep.point(1).newest_checkpoint.write_text("step_1")
    with pytest.raises(HpcmmError, match=f"is a sweep: name one of its points, such as {sweep.root.name}/0000"):
        launch(["cluster=slurm", "launch.snapshot=false", "train.init_from=first"])
    for named in ("first/0001", "11_1", f"runs/{sweep.root.name}/0001"):
        submission = launch(["cluster=slurm", "launch.snapshot=false", f"train.init_from={named}"])
        assert submission.planned.config.train.init_from == str(sweep.point(1).root)
    with pytest.raises(HpcmmError, match="has no point 0002"):
        launch(["cluster=slurm", "launch.snapshot=false", "train.init_from=first/0002"])
