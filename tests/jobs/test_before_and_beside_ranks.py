"""What ends a job before, beside or without its ranks, and why a job waits: in words."""

import json
import os
from shlex import quote

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.jobs.diagnostics import RankDiagnostics, gather
from hpcmm.jobs.find_run import find_targets
from hpcmm.jobs.first_failure import first_failure
from hpcmm.jobs.state import local_job, reason_of_end, why_it_waits
from hpcmm.jobs.why import explanation_of, lines_of, values_of
from hpcmm.node.classify import Kind
from hpcmm.runs.failures import RankError, RankExit, error_file, exit_file, write
from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.jobs import Job

SLURMSTEPD_OOM = (
    "slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch. Some of the step tasks have been OOM Killed."
)

NO_PROCESS = "9" * 12


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two ranks whose job 7 failed, as Slurm's stand-ins say."""
    made = RunDir(tmp_path / "runs" / "demo-1")
    made.create()
    task = {"_target_": None}
    cluster = {"executor": "slurm", "nodes": 1, "ranks_per_node": 2}
    made.config.write_text(json.dumps({"name": "demo", "cluster": cluster, "task": task}), encoding="utf-8")
    made.submission_script.touch()
    made.submission.write_text('{"job_id": "7"}', encoding="utf-8")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    answer(tmp_path, "sacct")
    answer(tmp_path, "sinfo")
    queue(made)
    return made


def answer(folder, name, *lines):
    (folder / "bin" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    script = folder / "bin" / name
    script.write_text(parted_as_asked(f"#!/bin/sh\ncat {quote(str(script))}.txt\n"), encoding="utf-8")
    script.chmod(0o755)


def queue(run, state="FAILED", reason="NonZeroExitCode", exit_code="1:0", nodes="n1", started="2026-01-02T00:00:00"):
    """What squeue says of the job, and sacct of its exit code; sacct's reason is why the job waited last."""
    names = ["7", "7", "demo", "me", state]
    times = ["2026-01-01T00:00:00", started, "N/A", "0:10"]
    script = str(run.submission_script)
    listed = [*names, reason, *times, nodes, "1", script]
    accounted = [*names, "Resources", *times, nodes or "None assigned", "1", exit_code, "0:0", f"sbatch {script}"]
    answer(run.root.parent.parent, "squeue", "\x1f".join(listed))
    answer(run.root.parent.parent, "sacct", "\x1f".join(accounted))


def why(run):
    explanation = explanation_of(gather(find_targets("demo-1", run.root.parent)[0]))
    return "\n".join(lines_of(explanation))


@pytest.mark.parametrize(
    ("log", "kind", "said", "do"),
    [
        ("{spool}line 17: train: command not found", "import", "submission.sh: line 17: train: command", "PATH"),
        ("{spool}line 9: module: command not found", "import", "line 9: module: command", "has no module command"),
        (
            'Lmod has detected the following error: The following module(s) are unknown: "cuda/99"\n\nPlease check it.',
            "import",
            "Lmod has detected",
            "module avail",
        ),
        ("error while loading shared libraries: libcudart.so.12: cannot open", "import", "libcudart", "Install"),
        ("Traceback (most recent call last):\n  File \"a\", line 1\nImportError: no x", "import", "Import", "Inst"),
        ("slurmstepd: error: execve(): python: No such file or directory", "import", "execve()", "all nodes share"),
        ("{spool}line 3: ./a.sh: /bin/bash^M: bad interpreter: No such file or directory", "data", "^M", "dos2unix"),
        ("{spool}line 4: $'\\r': command not found", "data", "command not found", "dos2unix"),
        ("slurmstepd: error: couldn't chdir to `/x': No such file or directory: going on", "data", "chdir", "share"),
        ("{spool}line 16: /nowhere/env.sh: No such file or directory", "data", "/nowhere/env.sh", "can be read"),
        ("{spool}line 8:  4242 Illegal instruction     python x", "crashed", "Illegal instruction", "kind of CPU"),
        ("cp: error writing 'x': Disk quota exceeded", "disk full", "Disk quota exceeded", "Free space"),
        ("tar: x: Cannot write: No space left on device\nexiting with failure status", "disk full", "space", "Free"),
        (SLURMSTEPD_OOM, "out of memory", "want of memory", "cluster.memory_gb"),
        ("srun: error: Unable to create step for job 7: Memory required by task is not available", "not started",
         "Unable to create step", "scontrol show node"),
        ("srun: unrecognized option '--x'\nTry srun --help", "unknown", "log says: \"srun: unrecognized", "logs'"),
        ("{spool}line 5: FOO: unbound variable", "unknown", "FOO: unbound variable", "logs' last lines"),
        ("half a line that no newline ends", "unknown", "half a line that no newline ends", "logs' last lines"),
    ],
)  # fmt: skip
def test_the_batch_log_is_quoted_if_no_rank_left_a_record(run, log, kind, said, do):
    text = log.format(spool="/var/spool/slurmd/job00007/slurm_script: ")
    run.batch_log.write_text(f"Compiling ops.\n{text}", encoding="utf-8")
    told = why(run)
    assert told.splitlines()[0] == f"job 7 (demo-1): {kind}"
    assert "before any rank started" in told
    assert said in told
    assert do in told.split("do: ")[1]


def test_a_sentence_of_hpcmm_s_counts_first_and_what_a_program_said_beside_it_stands_below(run):
    run.batch_log.write_text(
        "/x/slurm_script: line 12: foo: command not found\n"
        "hpcmm: cluster.setup line 2 (`foo`) failed with status 127.\n",
        encoding="utf-8",
    )
    told = why(run)
    assert "what:     before any rank started: cluster.setup line 2 (`foo`) failed with status 127." in told
    assert "submission.sh: line 12: foo: command not found" in told
    assert told.count("cluster.setup line 2") == 1
    assert told.startswith("job 7 (demo-1): setup")
    assert "set PATH in cluster.setup" in told.split("do: ")[1]
    run.batch_log.write_text(
        "cp: error writing 'x': Disk quota exceeded\nhpcmm: cluster.setup line 1 (`cp x y`) failed with status 1.\n",
        encoding="utf-8",
    )
    assert why(run).startswith("job 7 (demo-1): disk full")


def test_only_the_newest_attempt_of_the_job_is_quoted(run):
    run.batch_log.write_text(
        "old: command not found\nsrun: error: n1: task 0: Exited with exit code 1\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=6.0\n"
        "line 3: first attempt: command not found\n"
        "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***\n"
        "srun: forcing job termination\n"
        "cp: cannot stat '/second': No such file or directory\n",
        encoding="utf-8",
    )
    told = why(run)
    assert "/second" in told
    assert "first attempt" not in told
    assert "old:" not in told


def test_what_ranks_of_an_earlier_attempt_left_is_not_the_newest_one_s_failure(run):
    write(RankExit(0, "n1", 5, 1, None), exit_file(run.failures / "7.0", 0))
    for path in (run.failures / "7.0").iterdir():
        os.utime(path, (1, 1))
    marker = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE ***\n"
    run.batch_log.write_text(marker, encoding="utf-8")
    assert "exit status 1" in why(run)
    run.batch_log.write_text(f"{marker}line 3: foo: command not found\n", encoding="utf-8")
    assert "foo: command not found" in why(run)
    assert "exit status 1" not in why(run)


def ended(status, *lines, **more):
    return RankDiagnostics(0, "n1", exit=RankExit(0, "n1", 5, status, None), last_lines=list(lines), **more)


def test_a_rank_without_an_exception_is_quoted_by_the_end_of_its_log(run):
    write(RankExit(1, "n1", 5, 42, None), exit_file(run.failures / "7.0", 1))
    run.rank_log(1).write_bytes(b"submitit INFO - Starting\nreading\n 10%\r 50%\rgiving up: no data")
    run.batch_log.write_text("srun: error: n1: task 1: Exited with exit code 42\n", encoding="utf-8")
    write(RankError(1, "n1", 5, "SystemExit", "42", ["SystemExit: 42"]), error_file(run.failures / "7.0", 1))
    told = why(run)
    assert 'what:     exit status 42; its log ends: "giving up: no data"' in told
    assert "          reading" in told
    assert "submitit INFO" not in told
    assert f"log:      {run.rank_log(1)}" in told


@pytest.mark.parametrize(
    ("status", "line", "kind"),
    [
        (127, "bash: line 1: train: command not found", "import"),
        (137, "done with epoch 3", "killed"),
        (139, "", "crashed"),
        (3, "fatal: Disk quota exceeded", "disk full"),
        (42, "giving up", "unknown"),
    ],
)
def test_an_exit_status_has_the_kind_that_its_log_or_a_shell_s_rule_gives(run, status, line, kind):
    write(RankExit(0, "n1", 5, status, None), exit_file(run.failures / "7.0", 0))
    run.rank_log(0).write_text(line, encoding="utf-8")
    assert why(run).startswith(f"job 7 (demo-1): {kind}")


def test_an_exception_that_a_program_survived_is_not_why_it_ended(run):
    traceback = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: 1\n'
    write(RankExit(0, "n1", 5, 42, None), exit_file(run.failures / "7.0", 0))
    run.rank_log(0).write_text(traceback + "step\n" * 50 + "giving up\n", encoding="utf-8")
    assert 'exit status 42; its log ends: "giving up"' in why(run)
    run.rank_log(0).write_text("50%|###  " + traceback, encoding="utf-8")
    assert "what:     KeyError: 1" in why(run)


TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n'


@pytest.mark.parametrize(
    ("status", "log", "kind", "what"),
    [
        (1, f"ERROR: shard 17 skipped\n{TRACEBACK}KeyError: 17\n" + "epoch\n" * 15 + "stopping: accuracy 0.3\n",
         "unknown", 'exit status 1; its log ends: "stopping: accuracy 0.3"'),
        (1, f"{TRACEBACK}ConnectionResetError: [Errno 104] Connection reset by peer\n" + "step\n" * 40,
         "unknown", 'exit status 1; its log ends: "step"'),
        (9, "FutureWarning: ModuleNotFoundError: No module named 'apex'\nNo space left on device (ignored)\n"
         "the learning rate is negative\n", "unknown", 'exit status 9; its log ends: "the learning rate is negative"'),
        (7, "No space left on device\nepoch 1\n", "unknown", 'exit status 7; its log ends: "epoch 1"'),
        (1, f"{TRACEBACK}KeyError: 17\ngiving up\n", "exception", "KeyError: 17"),
        (1, f"{TRACEBACK}KeyError: 17\n" + "[W1126 04:13:07.1 NCCL.cpp:9] not destroyed\n" * 9, "exception",
         "KeyError: 17"),
    ],
)  # fmt: skip
def test_the_kind_of_an_end_comes_from_what_ended_it_and_not_from_what_stands_above(run, status, log, kind, what):
    write(RankExit(0, "n1", 5, status, None), exit_file(run.failures / "7.0", 0))
    run.rank_log(0).write_text(log, encoding="utf-8")
    told = why(run)
    assert told.startswith(f"job 7 (demo-1): {kind}\n")
    assert f"what:     {what}\n" in told


def test_the_last_words_of_a_script_that_ended_itself_count_before_an_exception_that_it_handled(run):
    write(RankExit(0, "n1", 5, 1, None, "stopping: accuracy 0.3"), exit_file(run.failures / "7.0", 0))
    run.rank_log(0).write_text(f"{TRACEBACK}KeyError: 17\nepoch 2\nstopping: accuracy 0.3\n", encoding="utf-8")
    assert 'what:     exit status 1; it said: "stopping: accuracy 0.3"\n' in why(run)
    run.rank_log(0).write_text(f"{TRACEBACK}KeyError: 17\nstopping: accuracy 0.3\n", encoding="utf-8")
    assert 'what:     KeyError: 17; then exit status 1: "stopping: accuracy 0.3"\n' in why(run)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_rank_without_any_record_is_read_from_its_log_if_that_is_of_this_job(run, is_new):
    said = f"{TRACEBACK}OSError: [Errno 28] No space left on device\nhpcmm: {run.root} cannot be written (No space).\n"
    run.rank_metrics(0).write_text(
        json.dumps({"event": "start", "rank": 0, "node": "n1", "job_id": "7", "unix_ns": 5}) + "\n", encoding="utf-8"
    )
    run.rank_log(0).write_text(said, encoding="utf-8")
    began_s = 1_767_312_000 + 100_000  # well after the job's start, in any time zone
    os.utime(run.rank_log(0), (began_s, began_s) if is_new else (5, 5))
    told = why(run)
    assert told.startswith("job 7 (demo-1): disk full" if is_new else "job 7 (demo-1): unknown")
    assert ("OSError: [Errno 28] No space left on device" in told) == is_new


def with_settings(run, **given):
    known = json.loads(run.config.read_text())
    run.config.write_text(json.dumps(known | given), encoding="utf-8")


@pytest.mark.parametrize(
    "words", ["/opt/absent/bin/python: No such file or directory", "python3.99: command not found"]
)
def test_a_python_that_the_node_does_not_have_is_told_by_its_key(run, words):
    with_settings(run, cluster={"executor": "slurm", "nodes": 1, "ranks_per_node": 2, "python": words.split(":")[0]})
    run.batch_log.write_text(f"/var/spool/slurmd/job7/slurm_script: line 110: {words}\n", encoding="utf-8")
    told = why(run)
    assert told.startswith("job 7 (demo-1): setup")
    assert f"cluster.python is {words.split(':')[0]}, which node n1 cannot run" in told
    assert "Set cluster.python" in told.split("do: ")[1]


@pytest.mark.parametrize(
    ("sentence", "kind", "do"),
    [
        ("n1: /x has 5.24 MB free, but launch.stage copies 31.5 MB: stage less.", "disk full", "Free space"),
        ("n1: launch.stage cannot copy /x/fifo: it is a pipe. Remove it there.", "data", "can be read"),
        ("n1: launch.stage has no folder to copy to: /x is not there (No such file).", "setup", "cluster.scratch_dir"),
        ("n1: /x/y does not hold what was written: the disk is damaged.", "setup", "what the sentence says"),
    ],
)
def test_what_hpcmm_itself_says_before_the_ranks_is_no_exception_of_the_program(run, sentence, kind, do):
    run.batch_log.write_text(f"hpcmm: {sentence}\n0 of 1 nodes have their copy of launch.stage.\n", encoding="utf-8")
    told = why(run)
    assert told.startswith(f"job 7 (demo-1): {kind}\n")
    assert f"before any rank started: {sentence}" in told
    assert do in told.split("do: ")[1]


def test_a_network_error_of_a_line_before_the_ranks_is_none_between_them(run):
    run.batch_log.write_text("fatal: unable to access 'https://h/': Could not resolve host: h\n", encoding="utf-8")
    told = why(run)
    assert told.startswith("job 7 (demo-1): unknown")
    assert "own connection failed" in told


@pytest.mark.parametrize(
    ("launch", "attempts", "said", "do"),
    [
        ({}, "", "before any rank started", "cluster.setup, cluster.modules"),
        ({"stage": ["/data"]}, '{"job_id": "7"}\n', "launch.stage was still being copied", "Stage less"),
        ({}, '{"job_id": "7"}\n', "before any rank started", "the ranks' start"),
    ],
)
def test_a_time_limit_before_the_ranks_tells_what_the_job_was_at(run, launch, attempts, said, do):
    with_settings(run, launch=launch)
    run.attempts.write_text(attempts, encoding="utf-8")
    run.batch_log.write_text("conda: solving\nTerminated\n", encoding="utf-8")
    queue(run, state="TIMEOUT", reason="TimeLimit", exit_code="0:0")
    told = why(run)
    assert told.startswith("job 7 (demo-1): time limit")
    assert said in told
    assert 'its log ends: "conda: solving"' in told
    assert do in told.split("do: ")[1]


@pytest.mark.parametrize(
    ("script", "attempts", "is_odd"),
    [
        ('"$python" "$start" hpcmm.worker prepare "$run_dir"', "", True),
        ('"$python" "$start" hpcmm.worker prepare "$run_dir"', '{"job_id": "7"}\n', False),
        ("srun train", "", False),
    ],
)
def test_a_script_that_ended_well_before_its_ranks_is_not_said_to_have_done_its_work(run, script, attempts, is_odd):
    run.submission_script.write_text(f"#!/bin/bash\nexec true\n{script}\n")
    run.attempts.write_text(attempts, encoding="utf-8")
    queue(run, state="COMPLETED", reason="", exit_code="0:0")
    told = why(run)
    assert told.startswith("job 7 (demo-1): COMPLETED. ")
    assert ("none of its ranks started" in told) == is_odd
    assert ("Nothing has failed" in told) != is_odd


def test_advice_for_a_script_names_no_key_of_hpcmm_s_own_training(run):
    for message in ("CUDA out of memory. Tried", "gloo: Timed out waiting 5ms for recv"):
        write(RankError(0, "n1", 5, "RuntimeError", message, []), error_file(run.failures / "7.0", 0))
        do = why(run).split("do: ")[1]
        assert "train." not in do
        assert "parallel." not in do
    with_settings(run, task={"_target_": "hpcmm.workloads.x"})
    assert "parallel.collective_timeout_s" in why(run)


def test_a_run_that_was_moved_while_its_job_waited_is_told_by_the_directory_it_had(run):
    queue(run, exit_code="0:53", reason="JobLaunchFailure")
    jobs = {"7": {"script": str(run.submission_script)}}
    run.submission.write_text(json.dumps({"job_id": "7", "jobs": jobs}), encoding="utf-8")
    moved = run.root.parent / "elsewhere"
    run.root.rename(moved)
    told = "\n".join(lines_of(explanation_of(gather(find_targets("elsewhere", run.root.parent)[0]))))
    assert f"what:     {run.root} is gone, so Slurm could not write there; the run is now {moved}\n" in told
    assert "leave the run directory where it is" in told


def test_a_note_of_hpcmm_s_is_not_why_a_program_ended(run):
    write(RankExit(0, "n1", 5, 42, None), exit_file(run.failures / "7.0", 0))
    run.rank_log(0).write_text("hpcmm: nsys 2022 has no option x; recorded without.\ngiving up\n", encoding="utf-8")
    assert "giving up" in why(run).split("what:")[1].splitlines()[0]


def test_a_rank_that_only_srun_tells_of_is_quoted_by_its_log(run):
    run.batch_log.write_text("srun: error: n1: task 0: Exited with exit code 2\n", encoding="utf-8")
    run.rank_log(0).write_text("slurmstepd: error: execve(): python: No such file or directory\n", encoding="utf-8")
    told = why(run)
    assert told.startswith("job 7 (demo-1): import")
    assert 'srun says: Exited with exit code 2; its log ends: "slurmstepd: error: execve(): python' in told


def test_a_log_that_the_node_could_not_write_is_said(run):
    queue(run, reason="JobLaunchFailure", exit_code="0:53")
    told = why(run)
    assert told.startswith("job 7 (demo-1): not started")
    assert f"node n1 could not write {run.batch_log}" in told
    assert "Is runs_root on a file system that all nodes share" in told
    run.logs.rmdir()
    assert f"{run.logs} is gone" in why(run)


def test_a_run_directory_that_vanished_is_said(run):
    queue(run, exit_code="0:53", reason="JobLaunchFailure")
    run.root.rename(run.root.parent.parent / "elsewhere")
    lines = lines_of(explanation_of(gather(find_targets("7", run.root.parent)[0])))
    assert lines[0] == "job 7 (demo): not started"
    assert f"{run.root} is gone" in lines[1]


def test_a_script_that_was_killed_beside_its_ranks_was_not_cancelled(run):
    queue(run, exit_code="0:9", reason="JobLaunchFailure")
    for rank in range(2):
        write(RankExit(rank, "n1", 5, None, 15), exit_file(run.failures / "7.0", rank))
    assert "what:     SIGKILL ended the job's script" in why(run)
    run.batch_log.write_text(SLURMSTEPD_OOM, encoding="utf-8")
    assert why(run).startswith("job 7 (demo-1): out of memory")


def test_a_folder_that_is_gone_is_noted_whatever_ended_the_job(run):
    queue(run, state="CANCELLED", exit_code="0:0")
    run.root.rename(run.root.parent.parent / "elsewhere")
    lines = lines_of(explanation_of(gather(find_targets("7", run.root.parent)[0])))
    assert lines[-1] == f"note: {run.root} is gone, with what the job wrote there."


@pytest.mark.parametrize(
    ("slurm", "kind", "said"),
    [
        ({"state": "BOOT_FAIL", "reason": "None"}, Kind.node_failure, "did not start"),
        ({"state": "NODE_FAIL", "reason": "None"}, Kind.node_failure, "gave up node n1"),
        ({"exit_code": "0:9"}, Kind.killed, "SIGKILL ended the job's script"),
        ({"exit_code": "0:11"}, Kind.crashed, "SIGSEGV ended the job's script"),
        ({"exit_code": "1:0", "reason": "JobLaunchFailure"}, Kind.not_started, "could not start the job's script"),
        ({"reason": "BadConstraints", "nodes": ""}, Kind.not_started, "No nodes fit what it asks for"),
        ({"state": "DEADLINE", "reason": "DeadLine", "nodes": ""}, Kind.time_limit, "before its deadline before it"),
        ({"state": "OUT_OF_MEMORY", "exit_code": "0:125"}, Kind.out_of_memory, "want of memory"),
        ({"exit_code": "3:0"}, Kind.unknown, "no rank left a word of its end, exit code 3:0"),
    ],
)
def test_slurm_s_own_word_is_explained_if_nothing_else_tells(run, slurm, kind, said):
    queue(run, **slurm)
    evidence = gather(find_targets("demo-1", run.root.parent)[0])
    found = first_failure(evidence)
    assert found.kind is kind
    assert said in found.what


def test_a_job_that_was_cancelled_before_it_started_is_said_so(run):
    queue(run, state="CANCELLED", reason="BeginTime", nodes="", exit_code="0:0")
    told = why(run)
    assert "what:     the job was cancelled before it started" in told
    assert "BeginTime" not in told
    assert "log: " not in told


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Resources", "until enough nodes are free"),
        ("Priority", "higher priority"),
        ("Dependency", "waits for the end of the job"),
        ("DependencyNeverSatisfied", "never starts as it is: python -m hpcmm.jobs cancel 7,"),
        ("JobHeldUser", "`scontrol release 7`"),
        ("JobHoldMaxRequeue", "as often as Slurm allows"),
        ("launch failed requeued held", "Slurm could not start it"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-4]", "down, or reserved"),
        ("BadConstraints", "No nodes fit"),
        ("PartitionTimeLimit", "above that of its partition"),
        ("QOSMaxWallDurationPerJobLimit", "allows for one job"),
        ("AssocMaxJobsLimit", "starts when other jobs"),
        ("QOSMaxCpuPerUserLimit", "starts when other jobs"),
        ("SomethingNew", "Slurm's reason is SomethingNew."),
    ],
)
def test_a_job_that_waits_has_not_failed_and_is_told_why_it_waits(run, reason, said):
    queue(run, state="PENDING", reason=reason, nodes="", started="2026-01-02T00:00:00")
    explanation = explanation_of(gather(find_targets("demo-1", run.root.parent)[0]))
    assert not explanation.failed
    (line,) = lines_of(explanation)
    assert line.startswith("job 7 (demo-1): PENDING. Nothing has failed so far. ")
    assert said in line
    assert line.endswith("It is expected to start at 2026-01-02T00:00:00.")
    assert said in values_of(explanation)["waits"]


def test_why_a_job_waited_last_is_not_why_it_ended():
    def over(reason, nodes="n1"):
        return reason_of_end(Job("7", "7", state="FAILED", reason=reason, nodes=nodes))

    assert [over(reason) for reason in ("Resources", "QOSGrpCpuLimit", "NonZeroExitCode")] == [
        "",
        "",
        "NonZeroExitCode",
    ]
    assert over("by 1000 (BeginTime)") == "by 1000"
    assert [over(reason, "") for reason in ("Priority", "BadConstraints")] == ["", "BadConstraints"]
    assert why_it_waits(Job("7", "7", reason="NonZeroExitCode")) == ""


def test_the_annotated_step_of_the_failing_rank_is_told(run):
    error = RankError(0, "n1", 5, "ValueError", "bad", ["ValueError: bad"], step=20)
    write(error, error_file(run.failures / "7.0", 0))
    assert "reached:  step 20" in why(run)


def test_a_script_without_steps_of_its_own_is_not_said_to_have_finished_none(run):
    run.rank_metrics(0).write_text(
        json.dumps({"event": "start", "rank": 0, "node": "n1", "job_id": "7", "unix_ns": 5}) + "\n", encoding="utf-8"
    )
    write(RankExit(0, "n1", 5, 42, None), exit_file(run.failures / "7.0", 0))
    assert "no step" not in why(run)


@pytest.mark.parametrize("profile", [{"tool": "nsys"}, {"tool": None}])
def test_under_a_profiler_a_log_ends_where_the_program_s_does(run, profile):
    given = json.loads(run.config.read_text())
    run.config.write_text(json.dumps(given | {"profile": profile}), encoding="utf-8")
    run.rank_log(0).write_text("the last word\nGenerated:\n    /tmp/nsys/rank_0000.qdstrm\n", encoding="utf-8")
    write(RankExit(0, "n1", 5, 42, None), exit_file(run.failures / "7.0", 0))
    assert ('its log ends: "the last word"' in why(run)) == (profile["tool"] is not None)


@pytest.mark.parametrize(("state", "exit_code"), [("CANCELLED", "0:0"), ("FAILED", "1:0")])
def test_a_job_whose_predecessor_failed_names_that_job_and_is_not_to_be_cancelled(run, state, exit_code):
    run.submission_script.write_text("#!/bin/bash\n#SBATCH --dependency=afterok:17\n", encoding="utf-8")
    queue(run, state, "DependencyNeverSatisfied", exit_code, nodes="")
    told = why(run)
    assert "(job 17) did not end as it should" in told
    assert "do:       See why that one failed with python -m hpcmm.jobs why 17, then launch this one again." in told
    assert "cancel" not in told.lower().replace("slurm:    cancelled", "").replace("demo-1): cancelled", "")


def test_a_job_that_is_over_is_not_to_be_cancelled():
    over = Job("7", "7", state="CANCELLED", reason="BadConstraints")
    assert "cancel" not in why_it_waits(over)
    assert "Launch it again for what" in why_it_waits(over)


def test_a_local_run_that_stopped_as_asked_has_not_failed(run):
    given = json.loads(run.config.read_text())
    given["cluster"]["executor"] = "local"
    run.config.write_text(json.dumps(given), encoding="utf-8")
    (run.submitit / f"{NO_PROCESS}_submitted.pkl").touch()
    run.submission.write_text(json.dumps({"job_id": NO_PROCESS}), encoding="utf-8")
    assert local_job(run, NO_PROCESS, "demo", 2).state == "FAILED"
    run.stopped.touch()
    assert local_job(run, NO_PROCESS, "demo", 2).state == "COMPLETED"
    assert "It stopped as asked; nothing has failed." in why(run)
