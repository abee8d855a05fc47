"""The end of a job's script, run here with stand-ins for Slurm's commands: requeues, exit statuses, and a full disk."""

import signal
import subprocess
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.launch.script import Job, render_script
from hpcmm.runs.run_dir import RunDir, SweepDir

PYTHON = """case "$*" in *"worker port"*) echo 23456; exec /bin/sleep 60;; esac"""
SRUN = """case "$*" in *"worker rank"*) exec bash "$FAKES/ranks";; esac"""
SCONTROL = """[ "$1" = show ] && [ "$2" = hostnames ] && { echo node1; exit; }
echo "$*" >> "$FAKES/asked"
times=$(grep -c . "$FAKES/asked")
. "$FAKES/slurm" """
BUSY = "echo 'slurm_update error: Socket timed out on send/recv operation' >&2; exit 1"
STOPS = 'touch "$RUN/stopped"'
MARKS = """ended=$RUN/ended/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
trap '[ $? != 0 ] || { touch "$ended/0_of_2"; touch "$ended/1_of_2"; }' EXIT"""
"""What ranks leave that have ended well."""
PREEMPTED = 'echo "JobState=RUNNING"; echo "PreemptTime=2026-01-02T03:04:05"'


class Script:
    """A job's script in a run directory, and what the ranks and Slurm do when it runs."""

    def __init__(self, folder):
        self.folder, self.fakes, self.root = folder, folder / "bin", folder / "a run"
        self.fakes.mkdir()
        self.ranks = self.slurm = ":"
        self.marks = MARKS
        for name, body in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "exec /bin/sleep 0")):
            (self.fakes / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.fakes / name).chmod(0o755)

    def start(self, *overrides, task=None, restart=0, environ=(), **popen):
        sweep = SweepDir(self.root)
        self.run = RunDir(self.root) if task is None else sweep.point(task)
        if not self.run.root.exists():  # it is not started again
            self.run.create()
        (self.run.submitit / "task.pkl").touch()
        (self.fakes / "ranks").write_text(f"{self.marks}\n{self.ranks}")
        (self.fakes / "slurm").write_text(self.slurm)
        environment = {
            "PATH": f"{self.fakes}:/usr/bin:/bin", "FAKES": str(self.fakes), "RUN": str(self.run.root),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "node1",
        } | dict(environ)  # fmt: skip
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        if task is not None:  # the last task of an array has the array's own number
            environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        config = compose_run(["cluster=slurm", "cluster.setup=['export SCRIPT=$$']", *overrides])
        job = Job(RunDir(self.root), launcher=str(self.fakes / "python"), points=None if task is None else task + 1)
        file = self.folder / "script.sh"
        file.write_text(render_script(config, job))
        popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | popen
        return subprocess.Popen(["bash", str(file)], env=environment, text=True, **popen)

    def ends(self, *overrides, **keywords):
        """Status and output of the script, run to its end."""
        process = self.start(*overrides, **keywords)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said or ""

    @property
    def asked(self):
        """What scontrol was asked, but for names of hosts."""
        file = self.fakes / "asked"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def noted(self):
        return self.run.exit_status.read_text().splitlines()


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


BUILTINS = subprocess.run(["bash", "-c", "compgen -b"], capture_output=True, text=True, check=True).stdout.split()
OTHERS = [
    "apptainer",
    "cp",
    "date",
    "hostname",
    "ln",
    "mkdir",
    "mv",
    "rm",
    "scontrol",
    "sleep",
    "srun",
    "tail",
    "timeout",
]


@pytest.mark.parametrize("requeue", ["never", "on_stop", "on_node_failure", "slurm"])
@pytest.mark.parametrize("ranks", ["exit 3", STOPS])
def test_functions_that_the_submitting_shell_exports_take_the_place_of_no_command(script, requeue, ranks):
    script.ranks = ranks
    names = {*BUILTINS, *OTHERS} - {"builtin", "command", "unset", "eval", "."}
    body = '() { case $0 in */script.sh) builtin echo %s >> "$FAKES/called";; esac; command %s "$@"; }'
    functions = {f"BASH_FUNC_{name}%%": body % (name, name) for name in names}
    as_ever = script.ends(f"requeue={requeue}")[0]
    (script.root).rename(script.folder / "before")
    with_functions = script.ends(
        f"requeue={requeue}", "cluster.setup=['module load cuda']", environ=functions | {"BASH_FUNC_module%%": MODULE}
    )
    assert with_functions[0] == as_ever
    assert "loaded cuda" in with_functions[1]
    called = script.fakes / "called"
    assert (called.read_text().split() if called.exists() else []) == []


MODULE = "() { builtin echo loaded $2; }"
REQUEUED = ["update JobId=7 Requeue=1", "requeue 7"]


def test_a_job_that_stopped_with_a_checkpoint_goes_back_into_the_queue(script):
    script.ranks = STOPS
    status, said = script.ends()
    assert status == 0
    assert script.asked == REQUEUED
    assert said.endswith("hpcmm: stopped with a checkpoint; job 7 goes back into the queue and then on from there.\n")
    assert script.noted == ["7 stopped"]


def test_the_last_task_of_an_array_is_not_called_by_the_array_s_number(script):
    script.ranks = STOPS
    _, said = script.ends(task=3)
    assert script.asked == ["update JobId=7_3 Requeue=1", "requeue 7_3"]
    assert "job 7_3 goes back" in said
    assert script.noted == ["7_3 stopped"]


def test_a_job_that_did_not_stop_ends_as_its_ranks_end(script):
    script.ranks = "exit 3"
    assert script.ends()[0] == 3
    assert script.asked == []
    assert script.noted == ["7 3"]


def test_a_slurm_that_is_busy_is_asked_again(script):
    script.ranks = STOPS
    script.slurm = f'case "$times" in [124]) {BUSY};; esac'
    status, said = script.ends()
    assert status == 0
    assert script.asked == [REQUEUED[0]] * 3 + [REQUEUED[1]] * 2
    assert said.count("Socket timed out") == 2  # once for each question
    assert said.endswith("job 7 goes back into the queue and then on from there.\n")


@pytest.mark.parametrize("words", ["Access/permission denied", "Requested operation is presently disabled"])
def test_what_slurm_refuses_is_said_with_what_to_do(script, words):
    script.ranks = STOPS
    script.slurm = f"echo 'slurm_update error: {words}' >&2; exit 1"
    status, said = script.ends()
    assert status == 1  # so that no job starts that waits for this one to complete
    assert script.asked == REQUEUED[:1]
    assert "goes back" not in said
    assert said.endswith(
        f"hpcmm: stopped with a checkpoint, but Slurm did not queue job 7 again (slurm_update error: {words}). Unless "
        f"squeue shows it, go on from there with sbatch '{script.root}/submission.sh'\n"
    )
    assert script.noted == ["7 stopped"]


def test_a_sweep_s_point_that_was_not_queued_again_goes_on_with_resubmit(script):
    script.ranks = STOPS
    script.slurm = "echo 'Access/permission denied' >&2; exit 1"
    assert script.ends(task=0)[1].endswith(f"go on from there with python -m hpcmm.launch resubmit '{script.root}'\n")


def test_a_stop_on_a_node_without_scontrol_says_how_to_go_on(script):
    script.ranks = STOPS
    script.slurm = "echo 'bash: line 1: scontrol: command not found' >&2; exit 127"
    status, said = script.ends()
    assert status == 1
    assert "did not queue job 7 again (bash: line 1: scontrol: command not found)" in said
    assert script.noted == ["7 stopped"]


def test_a_second_warning_while_slurm_is_asked_changes_nothing(script):
    script.ranks = STOPS
    script.slurm = f'if [ "$times" = 1 ]; then kill -USR1 "$SCRIPT"; {BUSY}; fi'
    status, said = script.ends()
    assert status == 0
    assert script.asked == [REQUEUED[0], *REQUEUED]
    assert "goes back into the queue" in said
    assert script.noted == ["7 stopped"]


@pytest.mark.parametrize("number", ["TERM", "USR2"])
def test_slurm_is_not_asked_again_once_the_job_is_to_end(script, number):
    script.ranks = STOPS
    script.slurm = f'kill -{number} "$SCRIPT"; {BUSY}'
    status, said = script.ends()
    assert status == 0
    assert script.asked == REQUEUED[:1]
    assert "did not queue job 7 again (slurm_update error: Socket timed out" in said
    assert script.noted == ["7 stopped"]


def test_slurm_s_end_of_the_script_after_a_requeue_changes_no_word(script):
    script.ranks = STOPS
    script.slurm = 'case "$1" in requeue) kill -TERM "$SCRIPT";; esac'
    status, said = script.ends()
    assert status == 0
    assert "goes back into the queue" in said
    assert script.noted == ["7 stopped"]


@pytest.mark.parametrize("when", ["cluster.setup=['export SCRIPT=$$','kill -USR1 $$']", "name=later"])
def test_a_warning_reaches_the_ranks_whenever_it_comes(script, when):
    warn = 'kill -USR1 "$SCRIPT"; ' if when == "name=later" else ""
    script.ranks = f'{warn}until [ -e "$RUN/stop" ]; do /bin/sleep 0.05; done; {STOPS}'
    assert script.ends(when)[0] == 0
    assert script.asked == REQUEUED


def test_a_stop_without_a_requeue_is_noted_alone(script):
    script.ranks = STOPS
    assert script.ends("requeue=never") == (0, "")
    assert script.asked == []
    assert script.noted == ["7 stopped"]


def test_a_run_that_was_queued_again_forbids_slurm_to_repeat_that_and_trains_meanwhile(script):
    script.ranks = 'until [ "$(grep -c . "$FAKES/asked")" = 3 ]; do /bin/sleep 0.05; done'
    script.slurm = f'[ "$times" = 3 ] || {{ {BUSY}; }}'
    status, said = script.ends(restart=1)
    assert status == 0
    assert script.asked == ["update JobId=7 Requeue=0"] * 3
    assert said.count("hpcmm: ") == 1
    assert script.noted == ["7 restarted", "7 0"]


@pytest.mark.parametrize(("word", "status"), [("42", 42), ("143", 143), ("1", 1), ("$(exit 3)", 137), ("", 137)])
def test_the_job_s_status_is_that_of_the_rank_that_failed_first(script, word, status):
    script.ranks = f'mkdir -p "$RUN/failures/7.0"; echo {word!r} > "$RUN/failures/7.0/status"; exit 137'
    assert script.ends() == (status, "")
    assert script.noted == [f"7 {status}"]


def test_the_status_of_an_earlier_start_is_not_that_of_this_one(script):
    script.ranks = 'mkdir -p "$RUN/failures/7.0"; echo 42 > "$RUN/failures/7.0/status"; exit 5'
    assert script.ends(restart=1)[0] == 5


def marks(*names):
    return "\n".join(f'touch "$RUN/ended/7.0/{name}"' for name in names) or ":"


@pytest.mark.parametrize("left", [[], ["0_of_2"], ["0_of_3", "2_of_3"]])
@pytest.mark.parametrize(("word", "status"), [("", 1), ("143", 143)])
def test_srun_s_word_that_all_went_well_needs_that_of_each_rank(script, left, word, status):
    script.marks = marks(*left)
    script.ranks = f'mkdir -p "$RUN/failures/7.0"; echo {word!r} > "$RUN/failures/7.0/status"'
    ended, said = script.ends()
    assert ended == status
    assert "not all ranks are known to have ended well" in said
    assert script.noted == [f"7 {status}"]


def test_the_mark_of_a_rank_that_a_file_system_shows_late_is_waited_for(script):
    script.marks = marks("0_of_2")
    (script.fakes / "sleep").write_text(f"#!/bin/bash\n{marks('1_of_2')}\n")
    assert script.ends() == (0, "")
    assert script.noted == ["7 0"]
    assert not (script.run.ended / "7.0").exists()


@pytest.mark.parametrize("options", ["set -f", "shopt -s nullglob failglob", "GLOBIGNORE=*"])
def test_marks_are_found_and_missed_whatever_the_setup_lines_have_made_of_patterns(script, options):
    script.marks = marks("0_of_2")
    (script.fakes / "sleep").write_text(f"#!/bin/bash\n{marks('1_of_2')}\n")
    setup = f"cluster.setup=['export SCRIPT=$$','{options}']"
    assert script.ends(setup) == (0, "")
    script.root.rename(script.folder / "before")
    script.marks = ":"
    (script.fakes / "sleep").write_text("#!/bin/bash\n")
    status, said = script.ends(setup)
    assert status == 1
    assert "not all ranks are known to have ended well" in said


def test_marks_that_a_job_of_the_same_number_left_do_not_count(script):
    script.marks = ":"
    (script.fakes / "sleep").write_text("#!/bin/bash\n")
    left = 'mkdir -p "$RUN/ended/7.0" && touch "$RUN/ended/7.0/0_of_2" "$RUN/ended/7.0/1_of_2"'
    assert script.ends(f"cluster.setup=['export SCRIPT=$$','{left}']")[0] == 1


def test_a_node_that_slurm_gave_up_has_the_job_queued_again_though_srun_says_nothing(script):
    script.marks, script.slurm = marks("0_of_2"), "echo PreemptTime=None"
    (script.fakes / "timeout").symlink_to("/bin/false")
    assert script.ends("requeue=on_node_failure")[0] == 1
    assert script.noted == ["7 terminated"]


def test_a_run_directory_without_room_for_marks_leaves_it_to_srun(script):
    script.marks = ":"
    status, said = script.ends("cluster.setup=['export SCRIPT=$$','touch \"$RUN/ended\"']")
    assert status == 0
    assert "ended/7.0 cannot be made" in said
    assert script.noted == ["7 0"]


@pytest.mark.parametrize("full", ["log", "exit_status"])
@pytest.mark.parametrize("ranks", ["exit 42", f"{STOPS}; exit 42"])
def test_a_full_disk_changes_no_exit_status_and_no_requeue(script, full, ranks):
    script.ranks = ranks
    if full == "exit_status":
        script.ranks = f'rm -f "$RUN/exit_status"; ln -s /dev/full "$RUN/exit_status"; {ranks}'
    with Path("/dev/full").open("w") as disk:
        status, said = script.ends(**({"stdout": disk} if full == "log" else {}))
    assert status == 42
    assert script.asked == (REQUEUED if STOPS in ranks else [])
    assert ("exit_status cannot be written: job 7" in said) == (full == "exit_status")


def test_flags_that_cannot_be_removed_do_not_have_the_job_start_for_ever(script):
    script.ranks = STOPS
    status, said = script.ends("cluster.setup=['mkdir \"$RUN/stop\"']")
    assert status == 0
    assert script.asked == []
    assert "cannot be removed" in said


def test_a_run_directory_without_room_for_the_task_still_gets_its_name(script):
    script.ranks = 'ls "$RUN/submitit"'
    (script.fakes / "cp").symlink_to("/bin/false")
    assert script.ends() == (0, "7_submitted.pkl\ntask.pkl\n")


def test_slurm_s_own_requeue_is_left_to_slurm(script):
    script.ranks = STOPS
    script.slurm = "echo PreemptTime=None"
    status, _ = script.ends("requeue=slurm")
    assert status == 0
    assert script.asked == ["show job 7"]
    assert script.noted == ["7 stopped"]
    text = (script.folder / "script.sh").read_text()
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --signal" not in text
    assert "scontrol requeue" not in text


@pytest.mark.parametrize("ranks", ["exit 143", STOPS])
def test_a_preempted_script_waits_for_slurm_s_own_requeue(script, ranks):
    script.ranks, script.slurm = ranks, PREEMPTED
    (script.fakes / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    process = script.start("requeue=slurm")
    assert process.stdout.readline().startswith("hpcmm: preempted; job 7 waits for Slurm")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert script.noted == ["7 stopped" if ranks == STOPS else "7 terminated"]


def test_a_script_that_failed_by_itself_does_not_wait_for_slurm(script):
    script.ranks, script.slurm = "exit 42", f'[ "$times" = 3 ] || {{ {BUSY}; }}; echo PreemptTime=None'
    assert script.ends("requeue=slurm")[0] == 42
    assert script.asked == ["show job 7"] * 3
    assert script.noted == ["7 42"]


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_under_slurm_s_own_requeue_a_signal_to_the_script_reaches_the_ranks(script, name):
    # The script may not know its ranks yet when the first signal comes.
    script.ranks = f"trap 'echo heard; exit 0' {name}; while :; do kill -{name} $SCRIPT; /bin/sleep 0.1; done"
    status, said = script.ends("requeue=slurm")
    assert (status, said) == (0, "heard\n")
    assert not script.run.stop_request.exists()
    assert script.noted == ["7 0"]


@pytest.mark.parametrize(
    ("policy", "noted"), [("slurm", "terminated"), ("on_node_failure", "terminated"), ("on_stop", "143")]
)
def test_an_end_by_slurm_is_no_end_of_the_job_if_slurm_may_start_it_again(script, policy, noted):
    script.ranks = "echo ready; exec /bin/sleep 60"
    process = script.start(f"requeue={policy}")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert script.noted == [f"7 {noted}"]


def test_a_preemption_without_warning_is_followed_by_a_requeue(script):
    script.ranks, script.slurm = "exit 143", PREEMPTED
    status, said = script.ends("requeue=on_node_failure")
    assert status == 143
    assert script.asked == ["show job 7", "requeue 7"]
    assert "hpcmm: preempted; job 7 goes back into the queue" in said
    assert script.noted == ["7 terminated"]


def test_ranks_that_fail_on_living_nodes_are_not_queued_again(script):
    script.ranks, script.slurm = "exit 9", "echo PreemptTime=None"
    assert script.ends("requeue=on_node_failure") == (9, "")
    assert script.asked == ["show job 7"]
    assert script.noted == ["7 9"]


def test_a_dead_node_has_the_job_queued_again(script):
    script.ranks, script.slurm = "exit 9", f'[ "$times" != 2 ] || {{ {BUSY}; }}; echo PreemptTime=None'
    (script.fakes / "timeout").symlink_to("/bin/false")  # of the srun that asks the nodes
    status, said = script.ends("requeue=on_node_failure")
    assert status == 9
    assert script.asked == ["show job 7", "requeue 7", "requeue 7"]
    assert "hpcmm: not all nodes of node1 answer; job 7 goes back into the queue" in said
    assert script.noted == ["7 terminated"]


def test_a_job_that_slurm_does_not_queue_again_has_failed(script):
    script.ranks = "exit 9"
    script.slurm = '[ "$1" = show ] && echo PreemptTime=None || { echo "Access/permission denied" >&2; exit 1; }'
    (script.fakes / "timeout").symlink_to("/bin/false")
    assert script.ends("requeue=on_node_failure")[0] == 9
    assert script.noted == ["7 terminated", "7 9"]


HANGS = 'mkdir -p "$RUN/failures/7.${SLURM_RESTART_COUNT:-0}"; cd "$_"; touch hang.json; echo 124 > status; exit 143'


@pytest.mark.parametrize("requeue", ["never", "on_stop", "slurm"])
def test_a_job_that_the_watchdog_ended_has_a_word_and_a_status_of_its_own(script, requeue):
    script.ranks, script.slurm = HANGS, "echo PreemptTime=None"
    status, said = script.ends(f"requeue={requeue}", "launch.hang_s=600")
    assert (status, script.noted) == (124, ["7 hung"])
    assert "requeue 7" not in script.asked
    assert ("no checkpoint to go on from" in said) == (requeue == "on_stop")


def test_a_job_that_hung_is_queued_again_if_a_node_may_be_why(script):
    script.ranks = HANGS
    status, said = script.ends("requeue=on_node_failure", "launch.hang_s=600")
    assert status == 124
    assert script.asked == ["requeue 7"]
    assert "hpcmm: no rank moved; job 7 goes back into the queue" in said
    assert script.noted == ["7 terminated"]


def test_a_job_that_hung_goes_on_from_its_checkpoint(script):
    script.ranks = f'mkdir -p "$RUN/checkpoints/step_000010"; ln -s step_000010 "$RUN/checkpoints/latest"; {HANGS}'
    status, said = script.ends("requeue=on_stop", "launch.hang_s=600")
    assert status == 124
    assert script.asked == ["update JobId=7 Requeue=1", "requeue 7"]
    assert "hpcmm: no rank moved; job 7 goes back into the queue" in said
    assert script.noted == ["7 terminated"]


def test_a_script_that_stopped_with_a_checkpoint_before_goes_on_from_it_after_a_hang(script):
    script.ranks = STOPS
    script.ends("requeue=on_stop", "launch.hang_s=600")
    script.ranks = HANGS
    script.ends("requeue=on_stop", "launch.hang_s=600", restart=1)
    assert script.asked[-1] == "requeue 7"
    assert script.noted == ["7 stopped", "7 restarted", "7 terminated"]


def test_a_job_that_was_to_be_over_is_not_queued_again_after_a_hang(script):
    script.ranks = f"kill -USR2 $PPID; {HANGS}"
    assert script.ends("requeue=on_node_failure", "launch.hang_s=600")[0] == 124
    assert (script.asked, script.noted) == ([], ["7 hung"])


@pytest.mark.parametrize("requeue", ["on_stop", "on_node_failure"])
def test_a_job_that_hangs_again_and_again_is_over_at_its_fourth_time(script, requeue):
    script.ranks = f'mkdir -p "$RUN/checkpoints/latest"; {HANGS}'
    queued = []
    for restart in (0, 8, 9, 15):  # starts between them came to an end of another kind
        assert script.ends(f"requeue={requeue}", "launch.hang_s=600", restart=restart)[0] == 124
        queued.append(script.asked.count("requeue 7"))
    assert queued == [1, 2, 3, 3]
    assert script.noted[-2:] == ["7 restarted", "7 hung"]
