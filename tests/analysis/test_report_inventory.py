"""The inventory of the recorded ranks, given as a run directory and as loose files."""

import json
import os
import shlex
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from simulated import simulate_run

from hpcmm.analysis.extraction import ReportFacts
from hpcmm.analysis.report_inventory import take_inventory
from hpcmm.analysis.trace import RankTrace
from hpcmm.analyze import Analysis, analyze
from hpcmm.analyze.__main__ import main
from hpcmm.errors import HpcmmError
from hpcmm.page.headlines import coverage_line, failed_line, headline
from hpcmm.reports.report import Identity
from hpcmm.reports.run_record import RunRecord, read_run_record
from hpcmm.runs.metrics import RankStart
from hpcmm.runs.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path, samples: Path) -> RunDir:
    """A run directory of four ranks whose reports are the ``slow_data`` sample."""
    run_dir = RunDir(tmp_path / "a run's directory")
    run_dir.create()
    run_dir.config.write_text("cluster: {nodes: 2, ranks_per_node: 2}\nprofile: {tool: nsys, ranks: all}\n")
    for report in sorted((samples / "slow_data").iterdir()):
        shutil.copy(report, run_dir.nsys)
    for rank in range(4):
        start = {"event": "start", "rank": rank, "node": f"node{rank // 2 + 1}", "job_id": "17", "pid": 1}
        run_dir.rank_metrics(rank).write_text(json.dumps(start) + "\n")
    return run_dir


def report(run_dir: RunDir, rank: int) -> Path:
    return run_dir.nsys / f"rank_{rank:04d}.sqlite"


def edit(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


def statuses(analysis: Analysis) -> dict[int, str]:
    table = analysis.tables["coverage"]
    return dict(zip(table["rank"], table["status"], strict=True))


def reason(analysis: Analysis, rank: int) -> str:
    table = analysis.tables["coverage"]
    return str(table.loc[table["rank"] == rank, "reason"].iloc[0])


def test_all_found(run_dir: RunDir) -> None:
    analysis = analyze([run_dir.root])
    assert statuses(analysis) == dict.fromkeys(range(4), "found")
    assert analysis.exit_status == 0
    assert analysis.out == run_dir.analysis


def test_a_missing_rank_says_whether_it_started(run_dir: RunDir) -> None:
    report(run_dir, 2).unlink()
    report(run_dir, 3).unlink()
    run_dir.rank_metrics(3).unlink()
    analysis = analyze([run_dir.root])
    assert statuses(analysis) == {0: "found", 1: "found", 2: "missing", 3: "missing"}
    assert "killed" in reason(analysis, 2)
    assert "has not started" in reason(analysis, 3)
    assert analysis.exit_status == 2
    assert (analysis.tables["bottlenecks"]["confidence"] != "high").all()


def test_a_rank_that_was_not_chosen_is_no_gap(run_dir: RunDir) -> None:
    run_dir.config.write_text("cluster: {nodes: 2, ranks_per_node: 2}\nprofile: {tool: nsys, ranks: one_per_node}\n")
    report(run_dir, 1).unlink()
    report(run_dir, 3).unlink()
    analysis = analyze([run_dir.root])
    assert statuses(analysis) == {0: "found", 1: "not_profiled", 2: "found", 3: "not_profiled"}
    assert analysis.exit_status == 0


def test_a_cut_off_report_is_one_row_and_the_rest_is_analysed(run_dir: RunDir) -> None:
    whole = report(run_dir, 1).read_bytes()
    report(run_dir, 1).write_bytes(whole[: len(whole) // 3])
    analysis = analyze([run_dir.root])
    assert statuses(analysis)[1] == "truncated"
    assert analysis.exit_status == 2
    assert analysis.tables["bottlenecks"].iloc[0]["rank"] == 2


def test_a_capture_without_ranges_says_why(run_dir: RunDir) -> None:
    edit(report(run_dir, 1), "DELETE FROM NVTX_EVENTS")
    analysis = analyze([run_dir.root])
    assert statuses(analysis)[1] == "no_nvtx"
    assert "nvtx==0.2.11" in reason(analysis, 1)
    assert (analysis.tables["osrt"]["rank"] == 1).any()


@pytest.mark.parametrize(("version", "advised"), [("0.2.11", False), ("0.2.13", True)])
def test_an_older_nvtx_is_advised_only_where_it_is_not_installed(
    run_dir: RunDir, version: str, *, advised: bool
) -> None:
    edit(report(run_dir, 1), "DELETE FROM NVTX_EVENTS")
    run_dir.provenance.write_text(json.dumps({"packages": {"nvtx": version}}))
    assert ("nvtx==0.2.11" in reason(analyze([run_dir.root]), 1)) is advised


def test_a_run_that_failed_before_its_first_step_says_so_and_what_tells_why(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(4):
        edit(report(run_dir, rank), "DELETE FROM NVTX_EVENTS")
    run_dir.exit_status.write_text("17 1\n")
    main([str(run_dir.root)])
    told = capsys.readouterr().out
    assert told.count(f"hpcmm.jobs why {shlex.quote(str(run_dir.root))} tells why.") == 1
    assert "nvtx==0.2.11" not in told


def test_a_capture_without_events_is_empty(run_dir: RunDir) -> None:
    edit(report(run_dir, 1), "DELETE FROM NVTX_EVENTS")
    edit(report(run_dir, 1), "DELETE FROM OSRT_API")
    assert statuses(analyze([run_dir.root]))[1] == "empty"


def test_another_jobs_report_is_not_mixed_in(run_dir: RunDir) -> None:
    edit(
        report(run_dir, 1),
        "UPDATE TARGET_INFO_SYSTEM_ENV SET value = 'SLURM_PROCID=1' || char(10, 0) || 'SLURM_JOB_ID=99'",
    )
    analysis = analyze([run_dir.root])
    assert statuses(analysis)[1] == "wrong_job"
    assert 1 not in set(analysis.tables["phases"]["rank"])


def later_window(report: Path, path: Path, seconds: int) -> None:
    shutil.copy(report, path)
    edit(path, f"UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs + {seconds} * 1000000000")  # noqa: S608


def test_a_rank_s_later_report_of_the_same_process_is_another_window(samples: Path, tmp_path: Path) -> None:
    for rank in range(4):
        one = tmp_path / f"report_{rank}.1.sqlite"
        shutil.copy(samples / "slow_data" / f"rank_{rank:04d}.sqlite", one)
        later_window(one, tmp_path / f"report_{rank}.2.sqlite", 600)
    once, twice = analyze(samples / "slow_data"), analyze(tmp_path)
    assert list(twice.coverage()["status"]) == ["found"] * 8
    assert list(twice.coverage()["rank"]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert coverage_line(twice.study).startswith("4 of 4 ranks with steps")
    assert len(twice.steps()) == 2 * len(once.steps())
    assert not twice.steps().duplicated(["rank", "step"]).any()
    assert len(twice.collectives()) == 2 * len(once.collectives())
    assert twice.collectives()["complete"].mean() == once.collectives()["complete"].mean()
    assert twice.osrt()["calls"].sum() == 2 * once.osrt()["calls"].sum()
    lost = [analysis.bottlenecks().iloc[0] for analysis in (once, twice)]
    assert lost[0]["rank"] == lost[1]["rank"]
    assert lost[1]["lost_s_per_step"] == pytest.approx(lost[0]["lost_s_per_step"], rel=0.1)
    assert twice.bottlenecks()["lost_s_per_step"].sum() < lost[1]["lost_s_per_step"] * 3
    assert twice.delays()["lost_s"].max() < 1.0


def test_windows_of_a_process_of_unknown_rank_are_one_rank(run_dir: RunDir, tmp_path: Path) -> None:
    one = shutil.copy(report(run_dir, 1), tmp_path / "one.sqlite")
    edit(one, "UPDATE TARGET_INFO_SYSTEM_ENV SET value = 'NONE=1' WHERE name = 'DeviceEnvironment'")
    edit(one, "DELETE FROM NVTX_EVENTS WHERE text LIKE 'rank=%'")
    later_window(one, tmp_path / "two.sqlite", 600)
    table = analyze(tmp_path.glob("*.sqlite")).coverage()
    assert list(table["rank"]) == [-1, -1]
    assert set(table["status"]) == {"found"}


def test_of_two_reports_of_one_rank_one_is_used(run_dir: RunDir) -> None:
    shutil.copy(report(run_dir, 2), run_dir.nsys / "again.sqlite")
    analysis = analyze([run_dir.root])
    table = analysis.tables["coverage"]
    assert sorted(table.loc[table["rank"] == 2, "status"]) == ["duplicate", "found"]
    assert len(analysis.tables["collectives"].query("rank == 2")) == len(
        analysis.tables["collectives"].query("rank == 1")
    )


def test_the_rank_comes_from_the_environment_not_from_the_file(run_dir: RunDir, tmp_path: Path) -> None:
    shuffled = tmp_path / "loose"
    shuffled.mkdir()
    for rank, name in enumerate(("d", "c", "b", "a")):
        shutil.copy(report(run_dir, rank), shuffled / f"{name}.sqlite")
    analysis = analyze([shuffled], tmp_path / "out")
    table = analysis.tables["coverage"].set_index("report")
    assert table["rank"].to_dict() == {"a.sqlite": 3, "b.sqlite": 2, "c.sqlite": 1, "d.sqlite": 0}


def test_without_environment_the_run_record_tells_the_rank(run_dir: RunDir) -> None:
    edit(report(run_dir, 2), "DELETE FROM TARGET_INFO_SYSTEM_ENV")
    analysis = analyze([run_dir.root])
    assert statuses(analysis) == dict.fromkeys(range(4), "found")
    assert analysis.tables["bottlenecks"].iloc[0]["node"] == "node2"


def test_nothing_usable_is_an_error_in_one_sentence(run_dir: RunDir) -> None:
    for rank in range(4):
        report(run_dir, rank).write_bytes(b"not a database" * 100)
    with pytest.raises(HpcmmError, match="none of the 4 reports is usable"):
        analyze([run_dir.root])


def test_the_h100_report_is_listed_as_what_it_is(samples: Path, tmp_path: Path) -> None:
    analysis = analyze([samples / "h100_2gpu_nccl.sqlite"], tmp_path)
    row = analysis.tables["coverage"].iloc[0]
    assert row["status"] == "no_steps"
    assert row["rank"] < 0
    assert row["nsys_version"].startswith("2026.2")
    assert analysis.exit_status == 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE NVTX_EVENTS SET int64Value = 9223372036854775807 WHERE rowid = 20",
        "UPDATE NVTX_EVENTS SET text = x'ff00', textId = NULL WHERE rowid = 20",
        "UPDATE StringIds SET value = 'all_reduce group=0 seq=99999999999999999999999 bytes=4' WHERE rowid = 20",
        'UPDATE OSRT_API SET start = 0, "end" = 1152921504606846975 WHERE rowid < 12',
    ],
)
def test_values_that_no_profiler_writes_cost_one_report_at_most(run_dir: RunDir, statement: str) -> None:
    edit(report(run_dir, 1), statement)
    analysis = analyze([run_dir.root])
    found = statuses(analysis)
    assert {rank: found[rank] for rank in (0, 2, 3)} == {0: "found", 2: "found", 3: "found"}
    assert (analysis.write() / "report.html").is_file()


@pytest.mark.parametrize(
    "text", ["a: 2001-99-99", "[" * 3000, "cluster: {nodes: 99999999999, ranks_per_node: 4}", "\x00"]
)
def test_a_damaged_run_record_costs_no_report(run_dir: RunDir, text: str) -> None:
    run_dir.config.unlink(missing_ok=True)
    run_dir.config.write_text(text)
    run_dir.rank_metrics(1).write_text('{"event":"start","rank":1e999,"node":"n","pid":5}\n["start",' + "[" * 100_000)
    assert set(statuses(analyze([run_dir.root])).values()) == {"found"}


def test_a_disk_that_cannot_be_written_is_named(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HpcmmError, match=r"file cannot be written .*--out"):
        analyze([run_dir.root], tmp_path / "file")


def test_a_cut_off_report_has_the_rank_that_its_name_tells_as_others_do(run_dir: RunDir, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    shutil.copytree(run_dir.nsys, loose)
    (loose / "rank_0002.sqlite").write_bytes((loose / "rank_0002.sqlite").read_bytes()[:3000])
    table = analyze([loose]).tables["coverage"]
    assert list(table["status"]) == ["found", "found", "truncated", "found"]
    assert list(table["rank"]) == [0, 1, 2, 3]


def test_a_cut_off_report_that_tells_no_rank_is_no_extra_rank(run_dir: RunDir, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    shutil.copytree(run_dir.nsys, loose)
    whole = loose / "rank_0002.sqlite"
    (loose / "late one.sqlite").write_bytes(whole.read_bytes()[:3000])
    whole.unlink()
    analysis = analyze([loose], tmp_path / "out")
    table = analysis.tables["coverage"]
    assert list(table["status"]) == ["found", "found", "found", "truncated"]
    assert (analysis.tables["environment"]["rank"].nunique()) == 3


def test_one_start_record_does_not_overrule_the_reports_job(run_dir: RunDir) -> None:
    for rank in (1, 2, 3):
        run_dir.rank_metrics(rank).unlink()
    start = {"event": "start", "rank": 0, "node": "node1", "job_id": "99", "pid": 1}
    run_dir.rank_metrics(0).write_text(json.dumps(start) + "\n")
    assert set(statuses(analyze([run_dir.root])).values()) == {"found"}


def test_the_ledger_counts_ranges_and_events(run_dir: RunDir) -> None:
    row = analyze([run_dir.root]).tables["coverage"].iloc[0]
    assert 0 < row["spans"] <= row["events"]
    assert row["nsys_version"] == "2022.4.2.1"


def test_a_capture_that_was_told_not_to_trace_nvtx_says_so(run_dir: RunDir) -> None:
    edit(report(run_dir, 1), "DELETE FROM NVTX_EVENTS")
    edit(report(run_dir, 1), "CREATE TABLE META_DATA_CAPTURE AS SELECT 'CAPTURE_EVENT_TYPE' AS name, 'Cuda' AS value")
    assert "told not to trace them" in reason(analyze([run_dir.root]), 1)


def test_names_that_hold_anything_reach_no_table_raw(run_dir: RunDir) -> None:
    hostile = (
        "'<script>alert(1)</script>' || char(27) || '[31m' || char(10) || '; DROP TABLE x' || "
        "replace(hex(zeroblob(500000)), '0', 'y')"
    )
    edit(report(run_dir, 1), f"UPDATE StringIds SET value = {hostile} WHERE value = 'poll'")  # noqa: S608
    chosen = "rowid % 7 = 0 AND eventType = 59"
    edit(report(run_dir, 1), f"UPDATE NVTX_EVENTS SET text = {hostile}, textId = NULL WHERE {chosen}")  # noqa: S608
    analysis = analyze([run_dir.root])
    names = [*analysis.tables["osrt"]["function"], *analysis.tables["phases"]["phase"]]
    assert any(name.startswith("<script>alert(1)</script>\\x1b[31m\\n; DROP TABLE") for name in names)
    assert all(name.isprintable() and len(name) < 1100 for name in names)


def test_unclosed_and_misnested_ranges_and_ends_before_starts_cost_no_other_rank(run_dir: RunDir) -> None:
    edit(report(run_dir, 1), 'UPDATE NVTX_EVENTS SET "end" = NULL WHERE rowid % 5 = 0')
    edit(report(run_dir, 1), 'UPDATE NVTX_EVENTS SET "end" = "end" + 30000000 WHERE rowid % 5 = 1')
    edit(report(run_dir, 1), 'UPDATE NVTX_EVENTS SET "end" = start - 5 WHERE rowid % 5 = 2')
    analysis = analyze([run_dir.root])
    assert statuses(analysis) == dict.fromkeys(range(4), "found") | {1: "truncated"}
    assert "ranges have times or threads that cannot be" in reason(analysis, 1)
    assert analysis.exit_status == 2


@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 50, b"SQLite format 3\0" + bytes(4000)])
def test_what_is_no_report_is_a_row_and_the_rest_is_analysed(run_dir: RunDir, content: bytes) -> None:
    report(run_dir, 1).write_bytes(content)
    analysis = analyze([run_dir.root])
    assert statuses(analysis) == {0: "found", 1: "truncated", 2: "found", 3: "found"}
    assert analysis.exit_status == 2


def test_a_file_that_may_not_be_read_is_a_row(run_dir: RunDir, tmp_path: Path) -> None:
    report(run_dir, 1).unlink()
    report(run_dir, 1).symlink_to("/proc/self/mem")
    assert statuses(analyze([run_dir.root]))[1] == "truncated"


def test_a_gap_in_the_ranks_of_loose_reports_is_a_missing_rank(samples: Path, tmp_path: Path) -> None:
    reports = [samples / "slow_data" / f"rank_{rank:04d}.sqlite" for rank in (0, 1, 3)]
    analysis = analyze(reports)
    assert statuses(analysis)[2] == "missing"
    assert analysis.exit_status == 2
    transfer = analysis.bottlenecks().query("cause.str.startswith('communication')")
    assert set(transfer["confidence"]) <= {"low"}


def test_a_rank_alone_tells_no_transfer_from_waiting(samples: Path) -> None:
    transfer = analyze(samples / "slow_link" / "rank_0000.sqlite").bottlenecks().query("cause.str.startswith('comm')")
    assert list(transfer["confidence"]) == ["low"]
    assert "may be waiting" in transfer["evidence"].iloc[0]


def test_a_rank_whose_steps_are_lost_is_not_taken_for_a_fast_one(run_dir: RunDir) -> None:
    edit(report(run_dir, 2), 'UPDATE NVTX_EVENTS SET "end" = start WHERE eventType = 59')
    analysis = analyze([run_dir.root])
    assert statuses(analysis)[2] == "no_steps"
    assert set(analysis.bottlenecks()["confidence"]) <= {"low", "medium"}


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("import torch\n", "for batch in hpcmm.annotate.steps(loader):"),
        ("import torch, os\nimport beside\n", "for batch in hpcmm.annotate.steps(loader):, or around each"),
        ("from transformers import Trainer\nimport accelerate\n", "accelerate_steps(accelerator, loader)"),
        ("    from transformers import Trainer\n", "StepAnnotation()"),
        ("import pytorch_lightning as pl\n", "LightningSteps()"),
        ("\0", "hpcmm.annotate.steps(loader)"),
    ],
)
def test_what_is_missing_is_said_with_the_line_that_the_script_needs(run_dir: RunDir, script: str, line: str) -> None:
    for rank in range(4):
        edit(report(run_dir, rank), "DELETE FROM NVTX_EVENTS WHERE eventType = 59")
    run_dir.config.write_text(
        run_dir.config.read_text() + "task: {name: script, path: /elsewhere/run/code/project/train.py}\n"
    )
    (run_dir.code / "project").mkdir(parents=True, exist_ok=True)
    (run_dir.code / "project" / "train.py").write_text(script)
    (run_dir.code / "project" / "beside.py").write_text("import deepspeed\n")
    analysis = analyze([run_dir.root])
    assert set(statuses(analysis).values()) == {"no_steps"}
    assert reason(analysis, 0) == "its collectives are annotated, but no steps in domain hpcmm"
    assert line in headline(analysis.study)


def test_of_a_script_that_failed_the_reports_tell_whether_that_was_before_its_first_step(run_dir: RunDir) -> None:
    run_dir.config.write_text(run_dir.config.read_text() + "task: {name: script, path: train.py}\n")
    for metrics in run_dir.metrics.glob("*.jsonl"):
        metrics.write_text("".join(line for line in metrics.open() if '"event": "step"' not in line))
    run_dir.exit_status.write_text("7 1\n")
    later = analyze([run_dir.root])
    assert headline(later.study) == headline(replace(later.study, failed_run=""))
    why = f"python -m hpcmm.jobs why {shlex.quote(str(run_dir.root))} tells why"
    assert failed_line(later.study) == f"the run failed; {why}"
    for rank in range(4):
        edit(report(run_dir, rank), "DELETE FROM NVTX_EVENTS WHERE eventType = 59")
    before = analyze([run_dir.root])
    assert reason(before, 0) == "the run failed before its first step"
    assert why in headline(before.study)
    assert failed_line(before.study) == ""


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", 7, "."])
def test_a_script_that_is_none_names_no_framework(run_dir: RunDir, path: object) -> None:
    run_dir.config.write_text(f"task: {{name: script, path: {json.dumps(path)}}}\n")
    assert read_run_record(run_dir).framework == ""


def test_a_pipe_a_folder_and_a_loose_link_cost_their_rank_alone(run_dir: RunDir) -> None:
    for rank in (1, 2, 3):
        report(run_dir, rank).unlink()
    os.mkfifo(report(run_dir, 1))
    report(run_dir, 2).mkdir()
    report(run_dir, 3).symlink_to("gone.sqlite")
    analysis = analyze([run_dir.root])
    assert statuses(analysis) == {0: "found", 1: "truncated", 2: "truncated", 3: "truncated"}
    assert "is not a file" in reason(analysis, 1)
    assert "No such file" in reason(analysis, 3)


def report_of_launcher(node: int, *workers: RankTrace, report: str = "") -> ReportFacts:
    identity = Identity(node, f"node{node + 1}", "17", environment={"SLURM_PROCID": str(node)})
    return ReportFacts(path=Path(report or f"rank_{node:04d}.nsys-rep"), traces=workers, identity=identity, events=9)


def launchers(nodes: int, profiled: frozenset[int] | None = None) -> RunRecord:
    starts = {node: RankStart(node, f"node{node + 1}", "17", 1) for node in range(nodes)}
    return RunRecord(nodes, 1, frozenset(range(nodes)) if profiled is None else profiled, starts)


def found(facts: list[ReportFacts], record: RunRecord) -> list[tuple[int, str, str]]:
    rows = take_inventory(facts, record).table[["rank", "node", "status"]].itertuples(index=False)
    return [(int(rank), node, status) for rank, node, status in rows]


WORKERS = simulate_run(lambda *_: 1.0, ranks=4, steps=3)
FOUR = [(0, "node1", "found"), (1, "node1", "found"), (2, "node2", "found"), (3, "node2", "found")]


def test_all_workers_of_a_launcher_a_node_are_ranks_of_their_node() -> None:
    reports = [report_of_launcher(0, *WORKERS[:2]), report_of_launcher(1, *WORKERS[2:])]
    assert found(reports, launchers(2)) == FOUR
    assert take_inventory(reports, launchers(2)).complete


def test_workers_that_all_tell_their_launcher_s_rank_or_none_are_numbered_as_they_were_started() -> None:
    for told in (lambda node: node, lambda _: -1):
        reports = [
            report_of_launcher(node, *(replace(each, rank=told(node)) for each in reversed(WORKERS[2 * node :][:2])))
            for node in range(2)
        ]
        assert found(reports, launchers(2)) == FOUR
        used = {trace.rank: trace.pid for _, trace in take_inventory(reports, launchers(2)).used}
        assert used == {rank: 100 + rank for rank in range(4)}
        reasons = take_inventory(reports, launchers(2)).table["reason"]
        assert reasons.str.startswith("its rank is a guess").all()


def test_workers_of_a_launcher_without_a_report_are_missing_or_were_not_chosen() -> None:
    reports = [report_of_launcher(0, *WORKERS[:2])]
    assert found(reports, launchers(2))[2:] == [(2, "node2", "missing"), (3, "node2", "missing")]
    not_chosen = found(reports, launchers(2, frozenset({0})))
    assert not_chosen[2:] == [(2, "node2", "not_profiled"), (3, "node2", "not_profiled")]


def test_a_worker_that_was_started_again_and_a_process_on_the_side_are_no_further_ranks() -> None:
    first, again = WORKERS[0], replace(WORKERS[0], pid=500, steps=WORKERS[0].steps + 10**12)
    beside = replace(WORKERS[0], pid=501, collectives=WORKERS[0].collectives.iloc[:0])
    for other in (again, beside):
        assert found([report_of_launcher(0, first, other)], launchers(1)) == [
            (0, "node1", "found"), (0, "node1", "duplicate"),
        ]  # fmt: skip


def test_of_several_ranks_a_node_two_that_tell_the_same_rank_are_still_one() -> None:
    record = RunRecord(2, 2, frozenset({0, 1}))
    reports = [report_of_launcher(0, WORKERS[0], replace(WORKERS[0], pid=500)), report_of_launcher(1, WORKERS[1])]
    assert [row[2] for row in found(reports, record)] == ["found", "duplicate", "found"]
