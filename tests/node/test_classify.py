"""From words to the kind of a failure."""

import re

import pytest

from hpcmm.node.classify import (
    Kind,
    cause_of_exception,
    complaint_in,
    kind_of_exception,
    kind_of_signal,
    kind_of_status,
    signal_name,
)
from hpcmm.runs.failures import last_logged_error, thrown_error

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
        ("ValueError", "failed to parse 'NVML, CUDA error budget' in table.csv", Kind.exception),
        ("RuntimeError", "the row 'CUDA error: none' is not a number", Kind.exception),
        ("RuntimeError", "sampler ran out of memory bank entries", Kind.exception),
        ("jaxlib.XlaRuntimeError", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9", Kind.out_of_memory),
        (
            "torch.distributed.DistBackendError",
            "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
            Kind.out_of_memory,
        ),
        ("torch.distributed.DistNetworkError", "failed to listen. port: 2, name: EADDRINUSE", Kind.rendezvous),
        ("torch.distributed.DistBackendError", "NCCL error, remote process exited", Kind.peer_lost),
        ("torch.distributed.DistBackendError", "socketStartConnect failed: Connection refused", Kind.peer_lost),
        ("hpcmm.errors.HpcmmError", "n1: /x has 5.24 MB free, but launch.stage copies 31.5 MB: set", Kind.disk_full),
        ("hpcmm.errors.HpcmmError", "n1: launch.stage cannot copy /x/fifo: it is a pipe", Kind.data),
        ("hpcmm.errors.HpcmmError", "n1: launch.stage has no folder to copy to: /x is not there", Kind.setup),
        ("KeyError", "'timeout'", Kind.exception),
    ],
)
def test_the_kind_follows_from_class_and_message(kind, message, expected):
    assert kind_of_exception(kind, message) is expected


def traceback_at(file, kind, message):
    return ["Traceback (most recent call last):", f'  File "{file}", line 3, in f', f"{kind}: {message}"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("urllib.error.URLError", "<urlopen error [Errno -2] Name or service not known>"),
        ("ConnectionRefusedError", "[Errno 111] Connection refused"),
        ("TimeoutError", "[Errno 110] Connection timed out: 's3.amazonaws.com'"),
        ("requests.exceptions.ConnectionError", "HTTPSConnectionPool(host='h', port=443): Max retries exceeded"),
        ("botocore.exceptions.ReadTimeoutError", 'Read timeout on endpoint URL: "https://s3"'),
        ("OSError", "We couldn't connect to 'https://huggingface.co' to load the files"),
    ],
)
def test_a_connection_of_the_program_s_own_is_none_between_ranks(kind, message):
    found, remedy = cause_of_exception(kind, message, traceback_at("/home/me/train.py", kind, message))
    assert found is Kind.exception
    assert "own connection failed" in remedy


@pytest.mark.parametrize(
    ("file", "message", "expected"),
    [
        ("/env/torch/distributed/distributed_c10d.py", "Connection reset by peer", Kind.peer_lost),
        ("/env/torch/distributed/distributed_c10d.py", "Socket Timeout", Kind.collective_timeout),
        ("/env/deepspeed/comm/torch.py", "Address already in use", Kind.rendezvous),
        ("/env/torch/distributed/checkpoint/filesystem.py", "Connection reset by peer", Kind.exception),
        ("/home/me/train.py", "Socket Timeout", Kind.exception),
    ],
)
def test_an_error_is_one_between_ranks_by_the_place_that_raised_it(file, message, expected):
    assert kind_of_exception("RuntimeError", message, traceback_at(file, "RuntimeError", message)) is expected


def test_a_port_of_the_program_s_own_and_a_pipe_between_processes_are_told_from_connections():
    busy = cause_of_exception("OSError", "[Errno 98] Address already in use")
    assert (busy[0], "port" in busy[1]) == (Kind.exception, True)
    reset = ("ConnectionResetError", "[Errno 104] Connection reset by peer")
    frames = traceback_at("/usr/lib/python3.11/multiprocessing/connection.py", *reset)
    assert cause_of_exception(*reset, frames) == (Kind.exception, "")
    assert cause_of_exception("BrokenPipeError", "[Errno 32] Broken pipe") == (Kind.exception, "")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("is killed by signal: Killed. ", Kind.killed),
        ("is killed by signal: Segmentation fault. ", Kind.crashed),
        ("is killed by signal: Bus error. ", Kind.crashed),
        ("is killed by signal: Bus error. It is possible that workers are out of shared memory.", Kind.out_of_memory),
        ("is killed by signal: Terminated. ", Kind.signalled),
        ("exited unexpectedly", Kind.exception),
    ],
)
def test_a_loader_s_worker_that_a_signal_ended_is_no_fault_of_the_data(said, expected):
    error = ("RuntimeError", f"DataLoader worker (pid 7105) {said}")
    assert kind_of_exception(*error, traceback_at("/env/torch/utils/data/dataloader.py", *error)) is expected


def test_advice_follows_from_the_exception_if_it_tells_more_than_its_kind():
    child = cause_of_exception("subprocess.CalledProcessError", "Command 'x' returned non-zero exit status 1.")
    assert "own words stand in the rank's log" in child[1]
    text = cause_of_exception("UnicodeDecodeError", "'utf-8' codec can't decode byte 0xe9")
    assert (text[0], "encoding" in text[1]) == (Kind.data, True)
    own = cause_of_exception("hpcmm.errors.HpcmmError", "model/modality=image_tiny cannot be made: side is 4.")
    assert own == (Kind.exception, "Do what the sentence says, then launch again.")
    assert cause_of_exception("hpcmm.errors.ScriptExitError", "train.py ended with status 3.")[1] == ""


@pytest.mark.parametrize(
    ("after", "kind"),
    [
        (["[rank0]:[W1126 04:13:07.1 ProcessGroupNCCL.cpp:9] process group was not destroyed"] * 5, "KeyError"),
        (["/lib/resource_tracker.py:254: UserWarning: leaked", "  warnings.warn("] * 4, "KeyError"),
        (
            [
                "Exception in thread Thread-1:",
                "Traceback (most recent call last):",
                '  File "b.py", line 1',
                "OSError: x",
            ],
            "KeyError",
        ),
        (["Error in atexit._run_exitfuncs:", "Traceback (most recent call last):", "  x", "OSError: x"], "KeyError"),
        ([f"  step {step}" for step in range(40)], None),
    ],
)
def test_what_is_said_while_a_program_ends_is_not_counted_behind_its_exception(after, kind):
    found = last_logged_error("\n".join([*traceback_at("a.py", "KeyError", "1"), *after]))
    assert (found.kind, found.lines_after <= 3) == ("KeyError", kind is not None)


def test_the_exception_that_ended_native_code_is_read_from_its_log():
    thrown = [
        "step 1",
        "terminate called after throwing an instance of 'c10::Error'",
        "  what():  not so",
        "frame #0: x",
    ]
    found = thrown_error(thrown)
    assert (found.kind, found.message, found.lines) == ("c10::Error", "not so", thrown[1:])
    assert thrown_error(["step 1"]) is None


@pytest.mark.parametrize(
    "line",
    [
        "FutureWarning: ModuleNotFoundError: No module named 'apex' - ignoring",
        "No space left on device (ignored, cache disabled)",
        "WARNING: CUDA out of memory handled, retrying with a smaller batch",
    ],
)
def test_what_a_program_went_on_after_is_no_failure(line):
    assert complaint_in([line]).kind is Kind.unknown


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


TORCHRUN = """\
[rank3]: Traceback (most recent call last):
[rank3]:   File "train.py", line 7, in <module>
[rank3]: ValueError: the third rank's own
[rank2]: Traceback (most recent call last):
[rank2]:   File "train.py", line 9, in <module>
[rank2]: RuntimeError: Connection closed by peer
W1126 13:08:45.289000 3234 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 3549 closing signal
E1126 13:08:45.307000 3234 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 1
Traceback (most recent call last):
  File "torchrun", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-26_13:08:45
  rank      : 2 (local_rank: 0)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-26_13:08:45
  rank      : 3 (local_rank: 1)
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
""".replace("ChildFailedError:", "ChildFailedError: ")


def test_of_torchrun_the_words_of_the_worker_that_failed_first_count():
    found = last_logged_error(TORCHRUN)
    assert (found.worker, found.kind, found.message) == (3, "ValueError", "the third rank's own")
    assert found.lines_after == 0
    before_a_group = re.sub(r"\[rank\d\]: ", "", TORCHRUN).partition("RuntimeError")[2]
    found = last_logged_error(f"Traceback (most recent call last):\n  File 'train.py'\nImportError{before_a_group}")
    assert (found.worker, found.kind) == (3, "ImportError")
    silent = last_logged_error(TORCHRUN.partition("W1126")[2])
    assert (silent.worker, silent.kind.rpartition(".")[2]) == (None, "ChildFailedError")
