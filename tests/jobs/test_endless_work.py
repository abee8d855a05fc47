"""What another user left in a run directory makes no command work without end."""

import inspect
import itertools
import re
import signal
from functools import partial

import pytest

from hpcmm.jobs import diagnostics, logs
from hpcmm.jobs.find_run import world_size_of
from hpcmm.node import classify
from hpcmm.ranges import MAX_RANK, MAX_WORLD_SIZE, ranks_in
from hpcmm.runs import failures, metrics, stacks
from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.jobs import Job

_PROCESSOR_TIME_S = 20
"""The work of each test takes a second at most; were it not bounded, it would take minutes."""
_CHARACTERS = 64_000
_TRACEBACK = "Traceback (most recent call last):"


@pytest.fixture(autouse=True)
def _ends():
    def stop(*_):
        raise AssertionError("it takes too long")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _PROCESSOR_TIME_S)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def _patterns(module):
    """Each with the way in which it is used: one that is only matched at a text's start may be slow to search."""
    source = inspect.getsource(module)
    for name, value in vars(module).items():
        if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
            look = value.search if re.search(rf"\b{name}\.(?:search|finditer|sub)\(", source) else value.match
            yield pytest.param(value.pattern, look, id=name)
        if name in {"_BY_WORDS", "_CONSOLE", "_REMEDIES"}:
            for kind, *texts in value:
                for text in texts if name == "_BY_WORDS" else texts[:1]:
                    yield pytest.param(text, re.compile(text, re.IGNORECASE).search, id=f"{name} {kind}")
    if module is classify:
        yield pytest.param(classify._CONNECTS, re.compile(classify._CONNECTS, re.IGNORECASE).search, id="_CONNECTS")


@pytest.mark.few(20)
@pytest.mark.parametrize(("pattern", "look"), [*_patterns(classify), *_patterns(failures), *_patterns(logs)])
def test_no_pattern_takes_long_for_what_nearly_fits_it_again_and_again(pattern, look):
    literals = re.findall(r"[A-Za-z0-9'\":(),/. \[*^-]{2,}", pattern.replace("\\", ""))
    pairs = [first + second for first, second in itertools.pairwise(literals)]
    for text in [*literals, *pairs, "a", "1", " ", "a.", "'", '"']:
        many = text * (_CHARACTERS // len(text))
        look(many)
        look("".join(literals[:1]) + many)


@pytest.mark.parametrize(
    "words",
    [
        "DataLoader worker " * 25_000 + " killed by signal: Bus error" * 16_000,
        "hpcmm.errors.HpcmmError: " + " has room for " * 30_000,
        "Connection" * 80_000,
        "timed out" * 80_000 + " gloo",
    ],
)
def test_an_exception_of_many_words_is_classified_by_its_first_ones(words):
    classify.cause_of_exception("RuntimeError", words, [words] * 1000)
    classify.complaint_in([words] * 100)


def test_what_is_read_of_a_record_is_as_long_as_a_rank_writes_it(tmp_path):
    attempt = tmp_path / "failures" / "7.0"
    path = failures.error_file(attempt, 0)
    failures.write(failures.RankError(0, "n1", 1, "E", "x" * 100_000, ["y" * 5000] * 150, ["n2"] * 5000), path)
    error = failures.read(path, failures.RankError)
    assert error is not None
    assert len(error.message) == failures.MOST_CHARACTERS
    assert [len(line) for line in error.traceback] == [failures.MOST_CHARACTERS] * 2 * failures.MOST_LINES


def test_of_many_tracebacks_the_last_ones_are_looked_at():
    assert failures.last_logged_error(f" {_TRACEBACK}\n" * 50_000 + "X: y").message == "y"
    assert failures.last_logged_error(f" {_TRACEBACK}\n" * 50_000) is None
    threads = f"Exception in thread 1\n{_TRACEBACK}\n  File\nX: in a thread\n" * 10_000
    assert failures.last_logged_error(threads).message == "in a thread"
    assert failures.last_logged_error(f"{_TRACEBACK}\nA: b\n{threads[:1000]}\n").message == "b"


def test_stacks_and_words_of_many_characters_are_looked_at_once():
    assert stacks.main_place("Thread 0x" + "a" * 200_000) is None
    assert logs.part_of_job("JOB 8 " * 40_000, "7") == "JOB 8 " * 40_000
    assert logs.part_of_job("a\nJOB 8 b\nJOB 7 c\n", "7") == "JOB 7 c\n"


def test_a_log_of_many_requeues_holds_one_attempt():
    requeues = "srun: DUE TO JOB REQUEUE\n" * 40_000
    assert logs.part_of_attempt(requeues) == requeues
    assert logs.part_of_attempt(requeues + "more\n") == "more\n"
    assert logs.part_of_attempt(requeues.replace("\n", " ")) == requeues.replace("\n", " ")
    assert logs.part_of_attempt("first\nJOB 7 DUE TO PREEMPTION\nagain\nsrun: DUE TO JOB REQUEUE\n") == (
        "again\nsrun: DUE TO JOB REQUEUE\n"
    )


def test_all_ranks_named_again_and_again_are_as_many_as_a_job_can_have():
    assert len(ranks_in(",".join(["0-999999"] * 5000))) == MAX_RANK + 1
    lines = [f"n1: tasks 0-{number + 500_000}: Killed" for number in range(5000)]
    assert logs.srun_words(lines)[3] == ("n1", "Killed")
    assert logs.early_ends(["srun: First task exited 60s ago", *(f"srun: {line}" for line in lines)])[0] == "60"


START = '{"event": "start", "rank": 0, "node": "n1", "job_id": "7", "pid": 1, "attempt": 1, "unix_ns": 5}\n'
STEP = '{"event": "step", "step": 4, "loss": 0.5, "step_s": 0.1, "attempt": 1, "unix_ns": 6}\n'


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "is_mine", lambda _: False)
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_empty_lines_in_front_of_a_first_step_are_not_kept(foreign):
    foreign.rank_metrics(0).write_text("\n" * 1_000_000 + START + STEP)
    (found,) = metrics.starts_of(foreign)
    assert (found.last.node, len(found.records)) == ("n1", 1)


@pytest.mark.parametrize("line", ["\n", "{}\n", '{"event": "startup", "part": "x"}\n', START])
def test_files_that_hold_more_than_those_of_any_run_tell_nothing(foreign, monkeypatch, line):
    monkeypatch.setattr(metrics, "_Allowance", partial(metrics._Allowance, 10_000_000, 1_000_000))
    first = foreign.rank_metrics(0)
    first.write_text(START + STEP)
    assert len(metrics.starts_of(foreign)) == 1
    first.write_text(START + line * (1_000_000 // len(line)))
    for rank in range(1, 300):
        foreign.rank_metrics(rank).hardlink_to(first)
    assert metrics.starts_of(foreign) == []


def test_of_many_files_the_last_lines_tell_how_far_the_ranks_came(foreign):
    first = foreign.rank_metrics(0)
    first.write_text(START + "{}\n" * 100_000 + STEP)
    for rank in range(1, 2000):
        foreign.rank_metrics(rank).hardlink_to(first)
    progress = metrics.progress_of(foreign)
    assert (len(progress), progress[1999].last_step, progress[1999].node) == (2000, 4, "n1")


@pytest.mark.parametrize(("nodes", "size"), [(2, 2000), (1000, 0), (10**30, 0)])
def test_a_configuration_of_more_ranks_than_any_run_has_tells_of_none(foreign, nodes, size):
    foreign.config.write_text(f"cluster: {{nodes: {nodes}, ranks_per_node: 1000}}")
    assert world_size_of(foreign) == size


def test_of_ranks_that_left_no_record_no_file_is_opened(foreign, monkeypatch):
    foreign.config.write_text(f"cluster: {{nodes: {MAX_WORLD_SIZE}, ranks_per_node: 1}}")
    attempt = foreign.failures / "7.0"
    failures.write(failures.RankError(3, "n1", 1, "ValueError", "x"), failures.error_file(attempt, 3))
    opened = []
    read = failures.read
    monkeypatch.setattr(failures, "read", lambda path, *more: opened.append(path.name) or read(path, *more))
    job = Job("7", "7", state="FAILED")
    ranks = diagnostics._ranks(foreign, job, attempt, [], 0)
    assert (len(ranks), ranks[3].error.message) == (MAX_WORLD_SIZE, "x")
    assert opened == ["rank_0003.error.json", "rank_0003.exit.json"]
