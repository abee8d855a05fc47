"""Every collective gets its range: held against the process groups' own sequence numbers."""

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hpcmm.annotate.schema import COMM_DOMAIN, CollectiveName, GroupMark, parse_expert_tokens
from hpcmm.config.schema import ProfileConfig
from hpcmm.node.network import find_free_port
from hpcmm.nsys.capture import run_under_nsys
from hpcmm.reports.events import read_report
from hpcmm.worker.nsys_rank import profile_flags
from hpcmm.worker.task import nsys_flags_of

SCRIPT = Path(__file__).with_name("collective_ranks.py")


def by_group(recorded):
    counts = Counter()
    for name, count in recorded.items():
        counts[name.split()[0]] += count
    return counts


@pytest.fixture(scope="module")
def captured(tmp_path_factory, nsys, compiled_ops):
    """What rank 0 counted under nsys, the names of the ranges in its report, and the report as it is read."""
    folder = tmp_path_factory.mktemp("collectives")
    port = str(find_free_port("127.0.0.1"))
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    other = subprocess.Popen([*command, "1", port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    counts = folder / "counts.json"
    shell = ["bash", "-c", 'exec "$@" >"$0"', str(counts), *command, "0", port]
    profiled = ProfileConfig(tool="nsys", flags_file="timeline.yaml")
    flags = [
        f"--{name}={value}" for name, value in profile_flags(profiled, 1, nsys_flags_of(profiled), gpu=False).items()
    ]
    assert run_under_nsys([nsys, "profile", *flags], shell, folder / "rank_0000.nsys-rep") == 0
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 0, errors
    export = ["nsys", "export", "--type=sqlite", f"--output={folder}/r.sqlite", f"{folder}/rank_0000.nsys-rep"]
    subprocess.run(export, check=True, capture_output=True)
    with sqlite3.connect(folder / "r.sqlite") as database:
        ranges = database.execute(
            "SELECT names.value, ranges.end FROM NVTX_EVENTS AS ranges "
            "JOIN StringIds AS names ON names.id = ranges.textId "
            "WHERE ranges.eventType = 60 AND ranges.domainId = "
            "(SELECT domainId FROM NVTX_EVENTS WHERE eventType = 75 AND text = ?)",
            (COMM_DOMAIN,),
        ).fetchall()
    said = next(line for line in counts.read_text(encoding="utf-8").splitlines() if line.startswith("{"))
    return json.loads(said), ranges, read_report(folder / "r.sqlite", folder / "rank_0000.nsys-rep")


@pytest.mark.nsys
def test_each_group_has_as_many_ranges_as_its_own_sequence_number(captured):
    counted, *_ = captured
    # gloo counts sends and receives among its own numbers, and so do the ranges.
    recorded = by_group(counted["recorded"])
    assert {group: recorded[group] for group in counted["own_numbers"]} == counted["own_numbers"]
    assert len(recorded) >= 3  # the world's, the pair's and DeepSpeed's


@pytest.mark.nsys
def test_functional_collectives_are_seen_once_each(captured):
    recorded = captured[0]["recorded"]
    assert [recorded[f"1 {op}"] for op in ("all_reduce", "all_gather", "reduce_scatter")] == [2, 1, 1]


@pytest.mark.nsys
def test_the_report_holds_these_ranges_each_closed_and_named(captured):
    counted, ranges, _ = captured
    names = [CollectiveName.parse(name) for name, _ in ranges]
    assert Counter(f"{name.group} {name.op}" for name in names) == counted["recorded"]
    assert [name for name, end in ranges if end is None] == []
    assert counted["open_ranges"] == 0


@pytest.mark.nsys
def test_sequence_numbers_run_without_a_gap_and_bytes_are_right(captured):
    ranges = captured[1]
    names = [CollectiveName.parse(name) for name, _ in ranges]
    for group in {name.group for name in names}:
        numbers = [name.sequence for name in names if name.group == group and name.op not in ("send", "recv")]
        assert sorted(numbers) == list(range(1, len(numbers) + 1))
    sizes = {name.op: name.bytes for name in names if name.group == "0" and name.sequence in range(41, 53)}
    assert sizes["barrier"] == 0
    assert sizes["broadcast"] == sizes["reduce"] == 4000
    assert sizes["reduce_scatter"] == sizes["all_to_all"] == 8000


@pytest.mark.nsys
def test_who_is_at_the_other_end_is_told_of_those_that_have_one(captured):
    ranges = captured[1]
    names = [CollectiveName.parse(name) for name, _ in ranges]
    told = {name.op: name.peer for name in names if name.group == "0"}
    assert told["send"] == 1
    assert told["broadcast"] == told["reduce"] == 0
    assert told["all_reduce"] is None
    assert told["barrier"] is None


@pytest.mark.nsys
def test_the_report_tells_what_the_groups_are_for(captured):
    report = captured[2]
    marks = [GroupMark.parse(name) for name in report.marks["name"]]
    told = {(mark.name, mark.ranks) for mark in marks if mark is not None}
    assert told == {("tensor", (0, 1)), ("data", (0, 1))}, "named by the script, and by its description"
    assert list(report.ranks.values()) == [0]
    assert [parse_expert_tokens(name) for name in report.marks["name"]].count(12) == 1


@pytest.mark.nsys
def test_what_an_all_to_all_of_unequal_parts_sends_and_gets_is_told(captured):
    names = [CollectiveName.parse(name) for name, _ in captured[1]]
    exchanged = [(name.bytes, name.sent, name.received) for name in names if name.op == "all_to_all"]
    assert exchanged == [(8000, None, None), (24, 16, 24)]


def test_without_a_profiler_nothing_is_installed():
    code = (
        "import torch.distributed as dist; wait = dist.Work.wait; from hpcmm import annotate; "
        "from hpcmm.annotate import collectives; assert collectives.install() is None; assert dist.Work.wait is wait; "
        "assert annotate.step(0) is annotate.phase('data')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NVTX")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LEAVES_ONE_OPEN = """
import sys, time
import torch, torch.distributed as dist
from hpcmm.annotate import collectives
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
collectives.install(force=True)
dist.barrier()
if rank == 1:
    time.sleep(1)  # meanwhile rank 0 comes to its end
work = dist.all_reduce(torch.ones(1), async_op=True)
if rank == 1:
    work.wait()
"""


def test_a_rank_that_ends_before_its_last_collective_does_is_no_failure(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", LEAVES_ONE_OPEN]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
