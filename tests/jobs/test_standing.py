"""Where ranks stand: who stands together, who is missing, and what may be said of it."""

import time

import pytest

from hpcmm.jobs import asking, standing
from hpcmm.jobs.asking import Ranks, lines_of_points, lines_of_ranks
from hpcmm.jobs.diagnostics import JobDiagnostics, RankDiagnostics
from hpcmm.jobs.first_failure import first_failure
from hpcmm.jobs.standing import Standing, findings, grouped, missing_ranks, numbered, standing_of
from hpcmm.jobs.why import explanation_of, lines_of
from hpcmm.node.classify import Kind
from hpcmm.runs.failures import RankExit
from hpcmm.runs.stacks import AT_END, Answer, HangNote, Look, Mark, Wait, Worker, main_place
from hpcmm.slurm.jobs import Job

C10D = "/env/lib/python3.11/site-packages/torch/distributed"


def stack(*frames):
    return "\n".join(["Stack (most recent call first):", *(f"  File {frame}" for frame in frames)]) + "\n"


MAIN = '"<frozen runpy>", line 88 in _run_code'
ALL_REDUCE = stack(
    f'"{C10D}/distributed_c10d.py", line 3135 in all_reduce',
    f'"{C10D}/c10d_logger.py", line 83 in wrapper',
    '"/home/me/train.py", line 3 in evaluate',
    '"/home/me/train.py", line 7 in <module>',
    MAIN,
)
BARRIER = stack(f'"{C10D}/distributed_c10d.py", line 5000 in barrier', '"/home/me/train.py", line 9 in <module>', MAIN)
SLEEP = stack('"/home/me/train.py", line 10 in <module>', MAIN)
LOADER = stack(
    '"/usr/lib/python3.11/selectors.py", line 415 in select',
    '"/usr/lib/python3.11/multiprocessing/queues.py", line 113 in get',
    '"/env/lib/python3.11/site-packages/torch/utils/data/dataloader.py", line 630 in __next__',
    '"/home/me/train.py", line 5 in <module>',
    MAIN,
)
BACKWARD = stack(
    '"/env/lib/python3.11/site-packages/torch/autograd/graph.py", line 829 in _engine_run_backward',
    '"/env/lib/python3.11/site-packages/torch/_tensor.py", line 625 in backward',
    '"/home/me/train.py", line 6 in <module>',
    MAIN,
)


def at(rank, text, number=None, **more):
    return Standing(rank, f"n{rank}", main_place(text), groups={} if number is None else {"0": number}, **more)


def said(*standings):
    return [(group.named, group.said) for group in grouped(numbered(standings))]


def test_ranks_stand_together_by_collective_number_and_the_line_that_calls_it():
    ranks = [at(0, ALL_REDUCE, 32), at(1, ALL_REDUCE, 32), at(3, SLEEP, 31), at(2, ALL_REDUCE, 32)]
    assert said(*ranks) == [
        ("0-2", "all_reduce number 32, called at train.py:3 in evaluate"),
        ("3", "train.py:10 in <module>"),
    ]


def test_the_function_of_a_library_in_which_a_rank_waits_is_named_with_the_innermost_one():
    assert said(at(0, LOADER)) == [("0", "train.py:5 in <module>, in __next__ (select)")]


def test_the_rank_that_is_in_no_collective_is_missing():
    ranks = numbered([at(0, ALL_REDUCE, 32), at(1, ALL_REDUCE, 32), at(2, SLEEP, 31)])
    assert [each.rank for each in missing_ranks(ranks)] == [2]
    assert findings(ranks) == [
        "rank 2 did not come to a collective that others wait in (ranks 0-1 in all_reduce number 32); "
        "its last one was number 31"
    ]


def test_ranks_in_different_collectives_wait_for_each_other():
    ranks = numbered([at(0, ALL_REDUCE, 32), at(1, BARRIER, 32)])
    assert missing_ranks(ranks) == []
    assert findings(ranks) == [
        "the ranks wait in different collectives: rank 0 in all_reduce number 32, rank 1 in barrier number 32"
    ]


def test_of_one_moment_no_more_is_said_than_where_the_ranks_were():
    (told,) = findings([at(0, ALL_REDUCE), at(1, SLEEP)], still=False)
    assert "rank 1 in no collective while others were" in told
    assert "did not come" not in told


def test_a_rank_in_backward_that_has_come_as_far_as_those_that_wait_is_not_missing():
    ranks = numbered([at(0, ALL_REDUCE, 9), at(1, BACKWARD, 9), at(2, BACKWARD, 8)])
    assert [each.rank for each in missing_ranks(ranks)] == [2]


def test_if_no_rank_moves_the_ones_that_are_not_in_backward_are_missing():
    ranks = numbered([at(0, BACKWARD), at(1, BACKWARD), at(2, SLEEP), at(3, BACKWARD)])
    assert [each.rank for each in missing_ranks(ranks, still=True)] == [2]
    assert findings(ranks) == [
        "rank 2 is not in a backward pass, in which ranks 0-1,3 wait, as for gradients",
    ]
    assert missing_ranks(ranks) == []
    assert findings(ranks, still=False) == []
    for all_alike in (SLEEP, BACKWARD):
        assert findings([at(0, all_alike), at(1, all_alike)]) == []
    assert findings([at(0, BACKWARD), Standing(1, "n1", why="it is stopped")]) == []


def test_ranks_that_wait_in_a_later_collective_than_another_one_are_not_missing():
    ranks = numbered([at(0, BACKWARD, 102), at(1, BACKWARD, 102), at(2, ALL_REDUCE, 101)])
    assert missing_ranks(ranks) == []
    assert findings(ranks) == [
        "the ranks wait in different collectives: ranks 0-1 in one of backward, number 102, "
        "rank 2 in all_reduce number 101"
    ]


def test_ranks_that_passed_a_collective_without_those_that_wait_in_it_are_not_said_to_have_not_come():
    ranks = numbered([at(0, SLEEP, 33), at(1, SLEEP, 33), at(2, ALL_REDUCE, 32)])
    assert findings(ranks) == [
        "ranks 0-1 are past a collective that others wait in (rank 2 in all_reduce number 32); "
        "their last one was number 33"
    ]


def test_of_several_groups_the_one_in_which_ranks_differ_gives_the_numbers():
    def rank(number, text, tensor, data):
        return Standing(number, "n", main_place(text), groups={"tensor": tensor, "data": data})

    ranks = numbered([rank(0, ALL_REDUCE, 40, 7), rank(1, ALL_REDUCE, 40, 7), rank(2, SLEEP, 40, 6)])
    assert [each.number for each in ranks] == [7, 7, 6]
    apart = numbered([rank(0, ALL_REDUCE, 41, 7), rank(1, SLEEP, 40, 6)])
    assert [each.number for each in apart] == [None, None]


def test_an_import_of_torch_is_no_collective():
    imports = stack(f'"{C10D}/rpc/api.py", line 3 in <module>', '"/home/me/train.py", line 1 in <module>', MAIN)
    (rank,) = missing_ranks(numbered([at(0, ALL_REDUCE, 6), at(1, imports)]))
    assert (rank.rank, rank.operation) == (1, None)


RECV = stack(
    f'"{C10D}/distributed_c10d.py", line 2720 in recv',
    f'"{C10D}/c10d_logger.py", line 83 in wrapper',
    '"/env/lib/python3.11/site-packages/deepspeed/comm/torch.py", line 460 in recv',
    '"/home/me/train.py", line 3 in evaluate',
    MAIN,
)
IN_WORK = stack('"/home/me/train.py", line 12 in reduce', '"/home/me/train.py", line 7 in <module>', MAIN)
GRID = {"0": ("", range(4)), "p0": ("pipeline", (0, 2)), "p1": ("pipeline", (1, 3))}
GRID |= {"t0": ("mesh_tp", (0, 1)), "t1": ("tensor", (2, 3))}
"""Two stages of two tensor ranks."""


def in_grid(rank, text, *waits, grid=GRID, mixed=(), **numbers):
    own = {group: (name, list(ranks)) for group, (name, ranks) in grid.items() if rank in ranks}
    marks = {group: Mark(name, ranks) for group, (name, ranks) in own.items() if name or group in {w[1] for w in waits}}
    groups = dict.fromkeys(own, 7) | numbers
    look = Look(1, text, groups=groups, waits=[Wait(*each) for each in waits], marks=marks, mixed=list(mixed))
    return standing_of(Answer(rank, f"n{rank}", "key", [look]))


def test_a_hang_of_a_pipeline_of_tensor_groups_names_what_each_rank_waits_in_and_who_is_missing_there():
    ranks = numbered(
        [
            in_grid(0, RECV, ("recv", "0", None, 2)),
            in_grid(1, RECV, ("recv", "0", None, 3)),
            in_grid(2, SLEEP, t1=12),
            in_grid(3, ALL_REDUCE, ("all_reduce", "t1"), t1=13),
        ]
    )
    assert [(group.named, group.said) for group in grouped(ranks)] == [
        ("0-1", "recv from ranks 2-3 of the pipeline groups of ranks 0,2; ranks 1,3, called at train.py:3 in evaluate"),
        ("2", "train.py:10 in <module>"),
        ("3", "all_reduce number 13 of the tensor group of ranks 2-3, called at train.py:3 in evaluate"),
    ]
    assert [each.rank for each in missing_ranks(ranks)] == [2]
    assert findings(ranks) == [
        "rank 2 did not come to an exchange that others wait in (rank 0 in recv from rank 2 of the pipeline group of "
        "ranks 0,2, rank 3 in all_reduce number 13 of the tensor group of ranks 2-3)",
        "others wait for these in turn: rank 1 in recv from rank 3 of the pipeline group of ranks 1,3",
    ]


def test_a_rank_that_nobody_waits_for_is_not_missing():
    ranks = numbered(
        [in_grid(0, SLEEP), in_grid(1, SLEEP), in_grid(2, ALL_REDUCE, ("all_reduce", "t1")), in_grid(3, SLEEP)]
    )
    assert [each.rank for each in missing_ranks(ranks)] == [3]


def test_ranks_that_wait_for_each_other_in_different_groups_are_told_with_these():
    ranks = [in_grid(0, RECV, ("recv", "0", None, 2)), in_grid(2, ALL_REDUCE, ("all_reduce", "p0"))]
    assert missing_ranks(numbered(ranks)) == []
    assert findings(numbered(ranks)) == [
        "the ranks wait in different exchanges: rank 0 in recv from rank 2 of the pipeline group of ranks 0,2, "
        "rank 2 in all_reduce number 7 of the pipeline group of ranks 0,2"
    ]


def test_numbers_of_a_group_in_which_ranks_also_send_are_left_out():
    everybody = {"0": ("", range(2)), "1": ("expert", range(2))}
    waits = in_grid(0, ALL_REDUCE, ("all_reduce", "0"), grid=everybody, mixed=["0"], **{"0": 40})
    assert findings(numbered([waits, in_grid(1, SLEEP, grid=everybody, **{"0": 31})])) == [
        "rank 1 did not come to a collective that others wait in (rank 0 in all_reduce of the group of all ranks)"
    ]


def test_a_wait_for_what_began_before_is_one_in_the_collective_that_the_missing_rank_has_not_begun():
    begun = ("all_gather", "t0", 8), ("reduce_scatter", "0", 9)
    ranks = [in_grid(0, IN_WORK, *begun), in_grid(1, IN_WORK, *begun), in_grid(2, SLEEP), in_grid(3, IN_WORK, begun[1])]
    assert said(*ranks) == [
        ("0-1,3", "reduce_scatter number 9 of the group of all ranks, called at train.py:12 in reduce"),
        ("2", "train.py:10 in <module>"),
    ]
    assert [each.rank for each in missing_ranks(numbered(ranks))] == [2]


def test_a_backward_pass_whose_collective_is_known_is_named_by_it():
    only = {"0": ("", range(3))}
    ranks = [in_grid(rank, BACKWARD, ("all_reduce", "0", 8), grid=only) for rank in (0, 1)]
    ranks = numbered([*ranks, in_grid(2, SLEEP, grid=only)])
    assert findings(ranks) == [
        "rank 2 did not come to a collective that others wait in (ranks 0-1 in all_reduce number 8); "
        "its last one was number 7"
    ]


def test_a_question_to_the_process_group_is_no_collective():
    asks = stack(
        f'"{C10D}/distributed_c10d.py", line 1345 in _get_default_group',
        f'"{C10D}/distributed_c10d.py", line 2392 in get_rank',
        '"/home/me/train.py", line 4 in load',
        MAIN,
    )
    (rank,) = missing_ranks(numbered([at(0, ALL_REDUCE, 6), at(1, asks, 5)]))
    assert (rank.rank, rank.operation) == (1, None)


LOOP = (
    '"/env/lib/python3.11/site-packages/torch/utils/data/_utils/worker.py", line 349 in _worker_loop',
    '"/usr/lib/python3.11/multiprocessing/process.py", line 314 in _bootstrap',
    '"/env/lib/python3.11/site-packages/torch/utils/data/dataloader.py", line 1000 in __init__',
    '"/home/me/train.py", line 5 in <module>',
    MAIN,
)
IDLE = stack(
    '"/usr/lib/python3.11/selectors.py", line 415 in select',
    '"/usr/lib/python3.11/multiprocessing/connection.py", line 1136 in wait',
    *LOOP,
)
READS = stack('"/home/me/data.py", line 6 in __getitem__', *LOOP)


def answer(rank, text, *workers, **more):
    return Answer(rank, f"n{rank}", "key", [Look(1, text)], workers=list(workers), **more)


def worker(pid, text="", **more):
    return Worker(pid, looks=[Look(1, text)], **more)


def test_a_rank_that_waits_for_its_loader_is_shown_with_the_worker_that_has_not_come_back():
    loaders = worker(7, READS, name="Process-1"), worker(8, IDLE, name="Process-2")
    assert standing_of(answer(0, LOADER, *loaders)).said == (
        "train.py:5 in <module>, in __next__ (select); Process-1 at data.py:6 in __getitem__"
    )
    assert standing_of(answer(0, SLEEP, *loaders)).said == "train.py:10 in <module>"


PROGRAM = stack(
    '"/usr/lib/python3.11/subprocess.py", line 1264 in wait',
    '"/run/code/hpcmm/worker/signal_forwarding.py", line 60 in run_watched',
    '"/run/code/hpcmm/worker/entrypoint.py", line 130 in _run_program',
    '"/run/code/hpcmm/start.py", line 16 in <module>',
)


def test_a_program_that_tells_nothing_is_shown_by_what_the_kernel_says_of_it():
    program = worker(7, name="solver", why="it sleeps in the kernel's pipe_read")
    assert standing_of(answer(0, PROGRAM, program)).said == "solver (it sleeps in the kernel's pipe_read)"


def test_ranks_that_cannot_tell_are_named_with_what_keeps_them():
    stopped = Standing(1, "n1", why="it is stopped (SIGSTOP)")
    assert said(at(0, ALL_REDUCE, 4), stopped, Standing(2)) == [
        ("0", "all_reduce number 4, called at train.py:3 in evaluate"),
        ("1", "it is stopped (SIGSTOP)"),
        ("2", standing._NO_ANSWER),
    ]
    assert [each.rank for each in missing_ranks([at(0, ALL_REDUCE, 4), stopped])] == [1]


def test_only_ranks_that_do_not_move_nor_work_nor_write_for_three_minutes_hang():
    assert Ranks([], [], moves=False, quiet_s=181.0).hang
    assert not Ranks([], [], moves=False, quiet_s=179.0).hang
    assert not Ranks([], [], moves=False, quiet_s=None).hang
    assert not Ranks([], [], moves=True, quiet_s=500.0).hang
    assert not Ranks([], [], moves=None, quiet_s=500.0).hang
    assert not Ranks([], [], moves=False, works=[1], quiet_s=500.0).hang


def test_many_groups_are_cut():
    ranks = [at(rank, stack(f'"/home/me/train.py", line {rank} in f', MAIN)) for rank in range(30)]
    lines = lines_of_ranks(Ranks(grouped(ranks), []))
    assert len(lines) == asking._MOST_SHOWN + 1
    assert lines[-1] == "          and 22 more ranks, each at another place"


def ended(state, *stacks, **more):
    ranks = {
        rank: RankDiagnostics(rank, f"n{rank}", exit=RankExit(rank, f"n{rank}", 9, None, 15), stacks=text)
        for rank, text in enumerate(stacks)
    }
    return JobDiagnostics(Job("7", "7", name="run", state=state, reason="by 1000"), None, ranks=ranks, **more)


def answers(*texts, number=5):
    looks = [[Look(time.time_ns(), text, groups={"0": number})] for text in texts]
    return {rank: Answer(rank, f"n{rank}", "key", each) for rank, each in enumerate(looks)}


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT"])
def test_a_job_that_slurm_ended_tells_who_ended_it_and_where_the_ranks_stood(state):
    text = "\n".join(lines_of(explanation_of(ended(state, ALL_REDUCE, ALL_REDUCE, SLEEP))))
    assert "cancelled by user 1000" in text or "reached its time limit" in text
    assert "ranks:    0-1: all_reduce, called at train.py:3 in evaluate" in text
    assert "          2: train.py:10 in <module>" in text
    assert "missing:  rank 2 in no collective while others were" in text


def test_numbers_that_were_told_before_count_if_the_rank_still_stood_there():
    evidence = ended("CANCELLED", ALL_REDUCE, SLEEP, answers=answers(ALL_REDUCE, BARRIER))
    text = "\n".join(lines_of(explanation_of(evidence)))
    assert "all_reduce number 5" in text
    assert "its last one" not in text


def test_without_stacks_of_the_end_the_last_ones_that_were_asked_for_are_shown_with_their_time():
    text = "\n".join(lines_of(explanation_of(ended("CANCELLED", "", "", answers=answers(ALL_REDUCE, SLEEP)))))
    assert "ranks:    as they stood at " in text
    assert "          1: train.py:10 in <module>" in text


def test_what_the_watchdog_ended_is_a_hang_whatever_the_ranks_said_then():
    evidence = ended("FAILED", "", "", answers=answers(ALL_REDUCE, SLEEP), hang=HangNote(9, 61.0))
    found = first_failure(evidence)
    assert (found.kind, found.rank, found.node) == (Kind.hang, 1, "n1")
    assert found.what.startswith("no rank moved for 61 s, so the job was ended; rank 1 did not come")


def test_of_ranks_that_a_launcher_had_started_the_stacks_of_the_end_are_shown_as_theirs():
    left = worker(7, ALL_REDUCE, rank=0, world=2), worker(8, SLEEP, rank=1, world=2)
    launcher = Answer(0, "n0", AT_END, [], workers=list(left))
    text = "\n".join(lines_of(explanation_of(ended("CANCELLED", PROGRAM, answers={0: launcher}))))
    assert "ranks:    0: all_reduce, called at train.py:3 in evaluate" in text
    assert "          1: train.py:10 in <module>" in text


def test_points_of_a_sweep_whose_ranks_move_share_a_line_and_the_others_tell_where_they_stand():
    still = Ranks(grouped([at(0, ALL_REDUCE, 4), at(1, SLEEP, 3)]), ["rank 1 did not come"], moves=False)
    moving = Ranks([], [], moves=True)
    assert lines_of_points([("0000", moving), ("0001", still), ("0002", moving)]) == [
        "running:  0000, 0002: the ranks move",
        "running:  0001: No rank moved between two looks 2 s apart.",
        "ranks:    0: all_reduce, called at train.py:3 in evaluate",
        "          1: train.py:10 in <module>",
        "missing:  rank 1 did not come",
    ]


def test_a_hostile_stack_takes_no_long_time_and_gives_no_long_line():
    place = main_place(stack('"' + "a/" * 100_000 + '", line 1 in ' + "f" * 100_000))
    assert place is not None
    began_s = time.process_time()
    assert Standing(0, place=place).said
    assert time.process_time() - began_s < 5
