"""Asking ranks where they stand, what they answer, and whether they move."""

import json
from dataclasses import replace

import pytest

from hpcmm.node.recorder import is_still, moved, wakes, works
from hpcmm.runs import stacks
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.stacks import Answer, Look, Worker, ranks_of

S = 1_000_000_000
STACK = 'Stack (most recent call first):\n  File "/home/me/train.py", line 3 in <module>\n'
OTHER = STACK.replace("line 3", "line 4")
COLLECTIVE = (
    'Stack (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line 3 in all_reduce\n'
    '  File "/home/me/train.py", line 3 in <module>\n'
)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def folder(run):
    folder = stacks.stacks_folder(run, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    folder.mkdir(parents=True)
    return folder


def look(**changes):
    return replace(Look(10 * S, STACK, 4, {"0": 7}, 1.0, 1.0, 100), **changes)


def test_a_rank_moves_with_its_step_its_collectives_its_stack_its_children_or_what_it_reads():
    before = look()
    now = look(unix_ns=12 * S)
    assert not moved(before, now)
    assert moved(before, replace(now, step=5))
    assert moved(before, replace(now, groups={"0": 8}))
    assert moved(before, replace(now, stack=OTHER))
    assert moved(before, replace(now, children_s=2.5))
    assert moved(before, replace(now, io_bytes=50 << 20))


def test_what_only_watches_the_machine_is_no_move():
    assert not moved(look(), look(unix_ns=12 * S, children_s=1.02, io_bytes=40_000))


def test_processor_time_of_a_rank_that_waits_for_others_or_a_gpu_is_no_work():
    def is_work(stack, **more):
        return works(look(stack=stack), look(stack=stack, unix_ns=12 * S, own_s=1.5, **more))

    assert is_work(STACK)
    assert not is_work(COLLECTIVE)
    assert not is_work(STACK, spins=True)
    assert not works(look(), look(unix_ns=12 * S, own_s=1.01))
    assert is_still(Answer(0, "n", "k", [look(), look(unix_ns=12 * S, own_s=1.5)]))


def test_who_asks_hears_what_was_answered_to_this_request_alone(run, folder):
    stacks.write_answer(folder, Answer(0, "n0", "an earlier request", [look()]))

    def answer_meanwhile(_s):
        request = stacks.read_request(run, folder)
        stacks.write_answer(folder, Answer(1, "n1", request.key, [look(), look()]))

    found = stacks.ask(run, folder, 2, 0.5, sleep=answer_meanwhile)
    assert list(found) == [1]
    assert found[1].looks == [look(), look()]


def test_the_newest_start_of_the_job_is_asked(run, folder):
    (run.stacks / "12.0").mkdir()
    (run.stacks / "9.7").mkdir()
    assert stacks.newest_folder(run, "12") == folder
    assert stacks.newest_folder(run, "1") is None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"node": 3, "key": "k", "why": "", "looks": []},
        {"node": "n", "key": "k", "why": "", "looks": "x"},
        [],
    ],
)
def test_an_answer_of_another_shape_is_none(run, folder, given):
    stacks.answer_file(folder, 0).write_text(json.dumps(given), encoding="utf-8")
    assert stacks.read_answers(run, folder) == {}


def test_what_another_user_wrote_into_an_answer_is_cut_and_typed(run, folder):
    looks = [
        {"stack": "x" * 300_000, "step": "4", "groups": {"0": -1, "1": True, "2": 9}, "own_s": "a", "unix_ns": 1.5}
    ]
    given = {"node": "n" * 10_000, "key": "k", "why": "w" * 10_000, "looks": looks * 50}
    stacks.answer_file(folder, 0).write_text(json.dumps(given | {"looks": looks}), encoding="utf-8")
    (answer,) = stacks.read_answers(run, folder).values()
    assert len(answer.node) == len(answer.why) == 300
    assert answer.looks == [Look(0, "x" * stacks.MOST_STACK, None, {"2": 9})]


def test_a_link_in_the_place_of_an_answer_is_not_followed(run, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps({"node": "n", "key": "k", "why": "", "looks": []}), encoding="utf-8")
    stacks.answer_file(folder, 0).symlink_to(elsewhere)
    assert stacks.read_answers(run, folder) == {}


def test_a_request_that_is_no_request_asks_for_nothing(run, folder):
    assert stacks.read_request(run, folder).key == ""
    stacks.request_file(folder).write_text('{"key": "a", "looks": 99, "ends": "yes"}', encoding="utf-8")
    assert stacks.read_request(run, folder).key == ""


def test_the_watchdogs_note_is_read_back(run):
    attempt = run.failures / "12.1"
    stacks.note_hang(attempt, 42.5)
    note = stacks.read_hang(run, attempt)
    assert note is not None
    assert note.still_s == 42.5


def launched(rank, *workers, **more):
    return Answer(rank, f"n{rank}", "key", [look()], workers=list(workers), **more)


def started(pid, rank=None, parent=0, **more):
    return Worker(pid, parent, looks=[look()], rank=rank, **more)


def ranks_in(*answers):
    found = ranks_of({answer.rank: answer for answer in answers})
    return {rank: [worker.pid for worker in each.workers] for rank, each in found.items()}


def test_the_workers_that_a_launched_process_has_started_are_the_ranks():
    first = launched(0, started(10), started(11, 0, 10), started(12, 1, 10), started(13, 1, 12))
    second = launched(1, started(20), started(21, 2, 20), started(22, 3, 20))
    assert ranks_in(first, second) == {0: [], 1: [13], 2: [], 3: []}


def test_workers_that_have_joined_a_group_are_ranks_whatever_they_inherited():
    spawned = launched(0, started(9, 0), started(10, 0, joined=True), started(11, 1, joined=True))
    assert ranks_in(spawned) == {0: [], 1: []}


def test_what_a_rank_has_started_for_itself_is_no_rank():
    assert ranks_in(launched(3, started(10, 3), started(11), joined=True)) == {3: [10, 11]}
    assert ranks_in(launched(3, started(10, 3), started(11))) == {3: [10, 11]}


def test_workers_that_each_launched_process_counts_from_0_stay_its_own():
    nodes = [launched(node, started(10, 0), started(11, 1)) for node in range(2)]
    assert ranks_in(*nodes) == {0: [10, 11], 1: [10, 11]}


def test_workers_of_wrong_types_or_out_of_bounds_are_left_out_and_many_are_cut(run):
    folder = run.stacks / "12.0"
    folder.mkdir(parents=True)
    good = {"pid": 5, "name": "x" * 9999, "why": "", "looks": [], "rank": -1, "world": 1 << 62}
    given = {"node": "n", "key": "k", "why": "", "looks": [], "workers": [7, {"pid": 1}, good]}
    stacks.answer_file(folder, 0).write_text(json.dumps(given), encoding="utf-8")
    (worker,) = stacks.read_answers(run, folder)[0].workers
    assert (worker.pid, len(worker.name), worker.rank, worker.world) == (5, 300, None, None)
    stacks.answer_file(folder, 0).write_text(
        json.dumps(given | {"workers": [good | {"name": "x"}] * 5000}), encoding="utf-8"
    )
    assert len(stacks.read_answers(run, folder)[0].workers) == stacks.MOST_WORKERS


def test_one_wake_between_two_looks_may_be_that_of_a_loader_s_queue():
    begun = Look(0, STACK, wakes=5)
    assert not wakes(begun, Look(2_000_000_000, STACK, wakes=6))
    assert wakes(begun, Look(2_000_000_000, STACK, wakes=7))
