"""From words to the kind of a failure."""

import pytest

from hpcmm.node.classify import (
    Kind,
    complaint_in,
    kind_of_exception,
    kind_of_signal,
    kind_of_status,
    signal_name,
)
from hpcmm.runs.failures import last_logged_error

PEER = "[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.14]:5245. Check the logs"


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", Kind.out_of_memory),
        ("MemoryError", "", Kind.out_of_memory),
        ("RuntimeError", "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate", Kind.out_of_memory),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", Kind.gpu_error),
        ("RuntimeError", "CUDA error: uncorrectable ECC error encountered", Kind.gpu_error),
        ("OSError", "[Errno 28] No space left on device: 'x'", Kind.disk_full),
        ("OSError", "[Errno 122] Disk quota exceeded", Kind.disk_full),
        ("hpcmm.errors.HpcmmError", "Rank 3 on n2 did not meet the other ranks at n1:2 within 300 s", Kind.rendezvous),
        ("torch.distributed.DistNetworkError", "The client socket has timed out after 60s", Kind.rendezvous),
        (
            "RuntimeError",
            "[unbound_buffer.cc:78] Timed out waiting 15000ms for send operation",
            Kind.collective_timeout,
        ),
        ("torch.distributed.DistBackendError", "Watchdog caught collective operation timeout", Kind.collective_timeout),
        ("RuntimeError", PEER, Kind.peer_lost),
        ("BrokenPipeError", "[Errno 32] Broken pipe", Kind.exception),
        ("ModuleNotFoundError", "No module named 'x'", Kind.import_failed),
        ("FileNotFoundError", "[Errno 2] No such file or directory: '/data/x'", Kind.data),
        ("PIL.UnidentifiedImageError", "cannot identify image file", Kind.data),
        ("ValueError", "the loss is not a number", Kind.exception),
        ("KeyError", "'timeout'", Kind.exception),
    ],
)
def test_the_kind_follows_from_class_and_message(kind, message, expected):
    assert kind_of_exception(kind, message) is expected


def test_an_exception_raised_from_another_takes_its_own_kind_first():
    chain = [
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in f',
        "    raise MemoryError",
        "MemoryError",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        '  File "b.py", line 1, in g',
        "RuntimeError: it failed",
    ]
    assert kind_of_exception("RuntimeError", "it failed", chain) is Kind.out_of_memory
    assert kind_of_exception("FileNotFoundError", "x", chain) is Kind.data


def test_an_import_that_failed_for_want_of_memory_is_one_of_memory():
    chain = ["RuntimeError: DefaultCPUAllocator: can't allocate memory", "ModuleNotFoundError: Could not import 'x'"]
    assert kind_of_exception("ModuleNotFoundError", "Could not import 'x'", chain) is Kind.out_of_memory
    chain[0] = "KeyError: 'x'"
    assert kind_of_exception("ModuleNotFoundError", "Could not import 'x'", chain) is Kind.import_failed


def test_source_lines_are_not_words_of_the_failure():
    chain = ["Traceback (most recent call last):", '  File "a.py", line 1, in f', "    # No space left on device"]
    assert kind_of_exception("ValueError", "x", chain) is Kind.exception


def test_an_error_of_hpcmm_s_data_modules_is_one_of_data():
    frame = [
        '  File "/env/hpcmm/workloads/anomaly/data/mvtec.py", line 41, in list_categories',
        "    raise HpcmmError()",
    ]
    assert kind_of_exception("hpcmm.errors.HpcmmError", "The data folder x does not exist", frame) is Kind.data
    assert kind_of_exception("hpcmm.errors.HpcmmError", "a wrong width") is Kind.exception


def test_signals_kill_or_are_crashes():
    assert kind_of_signal(9) is Kind.killed
    assert kind_of_signal(11) is Kind.crashed
    assert signal_name(9) == "SIGKILL"
    assert signal_name(4242) == "signal 4242"


LOG = """\
step 3
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    load()
KeyError: 'first'
went on
[rank1]: Traceback (most recent call last):
[rank1]:   File "train.py", line 9, in <module>
[rank1]:     main()
[rank1]: my.package.LoadError: no such shard
srun: error
"""


def test_the_last_exception_of_a_log_is_read_without_torch_s_prefix():
    logged = last_logged_error(LOG)
    assert (logged.kind, logged.message) == ("my.package.LoadError", "no such shard")
    assert logged.lines[0] == "Traceback (most recent call last):"
    assert last_logged_error("all is well\n") is None
    assert last_logged_error("hpcmm: nsys is not on the PATH.\n").message == "nsys is not on the PATH."
    assert last_logged_error("Traceback (most recent call last):\n  File") is None


def test_the_line_that_tells_most_is_quoted_with_the_last_ones_that_complain():
    lines = ["loading", "warning: cannot open display", "", "/x/slurm_script: line 3: foo: command not found", "bye"]
    found = complaint_in(lines)
    assert (found.kind, found.line) == (Kind.import_failed, "submission.sh: line 3: foo: command not found")
    assert found.lines == ["warning: cannot open display", found.line]
    assert "cluster.modules" in found.remedy


def test_a_log_without_complaints_is_quoted_by_its_end():
    found = complaint_in(["one", "two", "three", "four", ""])
    assert (found.kind, found.line, found.lines) == (Kind.unknown, "four", ["two", "three", "four"])


def test_slurm_s_words_of_what_follows_from_a_failure_are_no_complaint():
    follows = [
        "srun: error: n1: tasks 0-3: Exited with exit code 1",
        "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
        "srun: launch/slurm: _step_signal: Terminating StepId=7.0",
        "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***",
    ]
    assert complaint_in(follows) is None
    assert complaint_in(["foo: command not found", *follows]).line == "foo: command not found"
    late = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***"
    assert complaint_in([late]).kind is Kind.time_limit


def test_memory_that_ran_out_counts_before_what_came_of_it():
    oom = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch cgroup."
    assert complaint_in([oom, "tar: x: No such file or directory"]).kind is Kind.out_of_memory


def test_a_traceback_is_found_behind_a_progress_bar_and_what_follows_it_is_counted():
    text = ' 50%|###   | 1/2Traceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: 1\nbye\n\nbye\n'
    found = last_logged_error(text)
    assert (found.kind, found.message, found.lines_after) == ("KeyError", "1", 2)
    assert found.lines[0] == "Traceback (most recent call last):"


def test_a_status_above_128_is_the_signal_that_a_shell_means():
    assert [kind_of_status(status) for status in (137, 139, 143, 42, None)] == [
        Kind.killed,
        Kind.crashed,
        Kind.unknown,
        Kind.unknown,
        Kind.unknown,
    ]
