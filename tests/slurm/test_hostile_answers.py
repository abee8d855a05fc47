"""What Slurm answers may hold another user's text, or be no answer at all; nothing of it makes a job or an option."""

import os
import sys
from pathlib import Path
from shlex import quote

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.errors import HpcmmError
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.diagnostics import gather
from hpcmm.jobs.find_run import find_targets
from hpcmm.runs.submission import JobIdentity
from hpcmm.slurm import commands
from hpcmm.slurm.commands import SilentError, ask, run_command
from hpcmm.slurm.jobs import array_states, find_jobs, own_jobs
from hpcmm.slurm.sbatch import Accepted, accepted_by

pytestmark = pytest.mark.timeout(60)


def row(job_id="7", raw_id="7", name="run", command="(null)"):
    values = [job_id, raw_id, name, "me", "RUNNING", "None", *["N/A"] * 3, "0:10", "n1", "1", command]
    return "\x1f".join(values)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Writes a stand-in of a command of Slurm's, and returns what logs how all are called."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    calls.touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CLUSTERS", raising=False)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))

    def does(name, script):
        (folder / name).write_text(script, encoding="utf-8")
        (folder / name).chmod(0o755)

    def answers(name, *rows):
        (folder / f"{name}.txt").write_text("".join(f"{each}\n" for each in rows), encoding="utf-8")
        script = f'#!/bin/sh\necho {name} "$@" >> {quote(str(calls))}\ncat {quote(str(folder / name))}.txt\n'
        does(name, parted_as_asked(script))

    for name in ("squeue", "sacct", "scancel", "sinfo"):
        answers(name)
    answers.does, answers.calls, answers.folder = does, calls, folder
    return answers


@pytest.mark.parametrize(
    ("job_id", "raw_id"),
    [
        ("7", "999"),
        ("7", "--user=root"),
        ("--user=root", "--user=root"),
        ("7_1 --user=root", "7"),
        ("7_1", "--user=root"),
        ("7_[0-3] 8", "7"),
        ("7_" + "9" * 6000, "7"),
        ("7_[0-" + "9" * 6000 + "]", "7"),
        ("7_[0-999999999]", "7"),
        ("9" * 5000, "9" * 5000),
        ("\u0667", "\u0667"),
        ("", ""),
    ],
)
def test_a_row_whose_numbers_are_no_job_s_is_none(slurm, job_id, raw_id):
    slurm("squeue", row(job_id, raw_id), row("8", "8"))
    assert [job.job_id for job in own_jobs(None, None).jobs] == ["8"]
    with pytest.raises(HpcmmError, match="Nothing to cancel"):
        cancel("7", find_targets("7", Path("runs")))
    assert "scancel" not in slurm.calls.read_text()


@pytest.mark.parametrize(
    ("job_id", "raw_id", "cancelled"), [("7", "7", "7"), ("7_[0-3%2]", "7", "7_[0-3]"), ("7_1", "9", "7_1")]
)
def test_scancel_gets_the_number_that_was_asked_for_and_its_tasks(slurm, job_id, raw_id, cancelled):
    slurm("squeue", row(job_id, raw_id))
    cancel("7", find_targets("7", Path("runs")))
    assert f"scancel {cancelled}\n" in slurm.calls.read_text()


@pytest.mark.parametrize("heading", ["CLUSTER: --foo", "CLUSTER: -M", "CLUSTER: a b"])
def test_a_cluster_s_name_is_no_option(slurm, heading):
    slurm("squeue", "CLUSTER: good", row("8", "8"), heading, row())
    assert [(job.job_id, job.cluster) for job in own_jobs(None, None).jobs] == [("8", "good"), ("7", "")]


def test_a_job_s_name_with_line_breaks_and_separators_makes_no_row(slurm, tmp_path):
    forged = f"x\n{row('9', '9', name='of-root')}\nCLUSTER: other\n"
    answer = tmp_path / "answer.py"
    answer.write_text(
        "import sys\n"
        "layout = [word for word in sys.argv if word.startswith('--format=')][0].removeprefix('--format=')\n"
        f"values = {{'%j': {forged!r}, '%u': 'they', '%T': 'RUNNING'}}\n"
        "for number in ('JOBID', '7', '8'):\n"
        "    row = layout.replace('%i', number).replace('%A', number)\n"
        "    for each in 'juTrVSeMNDo':\n"
        "        row = row.replace(f'%{each}', values.get(f'%{each}', 'N/A'))\n"
        "    print(row)\n"
    )
    slurm.does("squeue", f'#!/bin/sh\nexec python3 {quote(str(answer))} "$@"\n')
    jobs = own_jobs(None, None).jobs
    assert [(job.job_id, job.user, job.cluster) for job in jobs] == [("7", "they", ""), ("8", "they", "")]
    assert jobs[0].name == forged


def altered(slurm, alter):
    """Let squeue's answer of one row, header and all, pass through a Python expression of ``text``."""
    (slurm.folder / "squeue").rename(slurm.folder / "whole")
    code = f"import sys; text = sys.stdin.buffer.read(); sys.stdout.buffer.write({alter})"
    whole = quote(str(slurm.folder / "whole"))
    slurm.does("squeue", f'#!/bin/sh\n{whole} "$@" | exec {quote(sys.executable)} -c {quote(code)}\n')


@pytest.mark.parametrize(
    "alter",
    [
        "b''",
        "b'x' * 1_000_000",
        "b'\\xff\\x00' * 1000",
        "b'slurm is under maintenance\\n'",
        "b'CLUSTER: here\\n'",
        "text[len(text) // 2 :]",
        "text[:-1]",
        "text[:-2]",
        "text[: len(text) // 2]",
        "text + b'8'",
        "text + b'CLUSTER: ot'",
    ],
)
def test_what_is_no_whole_answer_is_none_and_nobody_takes_it_for_an_empty_queue(slurm, alter):
    slurm("squeue", row("7", "7"))
    altered(slurm, alter)
    with pytest.raises(SilentError, match="squeue printed no whole list of jobs"):
        find_jobs(["7"])
    with pytest.raises(SilentError, match=r"see what `squeue` prints here"):
        array_states({"7": JobIdentity("7")})


@pytest.mark.parametrize(
    "alter",
    [
        "text",
        "b'Welcome\\nto this site\\n' + text",
        "text + b'Bye\\n'",
        "b'\\xef\\xbb\\xbf' + text",
        "text.replace(b'\\n', b'\\r\\n')",
        "b'CLUSTER: here\\n' + text",
    ],
)
def test_a_site_s_own_lines_before_and_after_an_answer_are_passed_over(slurm, alter):
    slurm("squeue", row("7", "7"))
    altered(slurm, alter)
    assert [job.job_id for job in find_jobs(["7"]).jobs] == ["7"]
    slurm("squeue")
    altered(slurm, alter)
    assert find_jobs(["7"]).jobs == []


def test_each_question_has_a_separator_of_its_own(slurm):
    for _ in range(2):
        find_jobs(["7"])
    asked = [line for line in slurm.calls.read_text().splitlines() if line.startswith("squeue")]
    assert len(asked) == len(set(asked)) == 2


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_command_that_writes_without_end_is_stopped_and_is_one_sentence(slurm, stream, monkeypatch):
    monkeypatch.setattr(commands, "_MOST_OUTPUT_BYTES", 5_000_000)
    slurm.does("squeue", f"#!/bin/sh\nexec yes {stream}\n")
    with pytest.raises(SilentError, match="squeue wrote more than 5 MB"):
        ask("squeue")


def test_a_command_that_says_much_on_both_ways_is_read_to_its_end(slurm):
    slurm.does("squeue", "#!/bin/sh\nseq 200000\nseq 200000 >&2\nprintf '\\377\\r\\n'\nexit 3\n")
    done = run_command(["squeue"], os.environ, 30)
    assert done.returncode == 3
    assert done.stdout.endswith("200000\n\ufffd\n")
    assert done.stderr.endswith("200000\n")


def test_a_command_that_closes_its_output_and_goes_on_is_not_waited_for_without_end(slurm):
    slurm.does("squeue", "#!/bin/sh\nexec >&- 2>&-\nexec sleep 600\n")
    with pytest.raises(SilentError, match=r"gave no answer within 0\.5 s"):
        ask("squeue", timeout_s=0.5)


def test_a_path_that_slurm_names_and_that_can_be_none_is_passed_over(slurm, tmp_path):
    listed = row(command="/a/XX/submission.sh")
    slurm.does("squeue", parted_as_asked(f"#!/bin/sh\nprintf '%s\\n' '{listed}' | tr X '\\000'\n"))
    (target,) = find_targets("7", tmp_path)
    assert gather(target).run is None
    assert [job.command for job in find_jobs(["7"]).jobs] == [""]


@pytest.mark.parametrize(
    "answer",
    [
        "Submitted batch job " + "9" * 5000,
        "Submitted batch job 99999999999",
        "Submitted batch job 7 on cluster -foo",
        "Submitted batch job 7 on cluster --user=root",
        "7;-foo",
        "9" * 11,
    ],
)
def test_what_cannot_be_a_job_or_a_cluster_is_not_taken_from_sbatch(answer):
    assert accepted_by(answer) is None


def test_a_job_of_a_named_cluster_is_taken_from_sbatch():
    assert accepted_by("Submitted batch job 7 on cluster gpu-1.a") == Accepted("7", "gpu-1.a")
    assert accepted_by("4294967295;gpu_2") == Accepted("4294967295", "gpu_2")
