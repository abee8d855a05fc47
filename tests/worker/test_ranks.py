"""The choice of profiled ranks, and the flags of their profiler."""

import json
import sys

import pytest

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.node import network
from hpcmm.nsys.capture import run_under_nsys
from hpcmm.ranges import profiled_ranks
from hpcmm.runs import failures
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.__main__ import check_rendezvous, is_finished, main
from hpcmm.worker.environment import RankEnvironment
from hpcmm.workloads.anomaly.schema import AnomalyConfig, AnomalyTrainConfig


@pytest.mark.parametrize(
    ("choice", "ranks"),
    [("all", {0, 1, 2, 3, 4, 5}), ("one_per_node", {0, 2, 4}), ("0", {0}), ("0, 3-5", {0, 3, 4, 5}), ("5,5", {5})],
)
def test_choices(choice, ranks):
    assert profiled_ranks(choice, 6, 2) == ranks


@pytest.mark.parametrize("choice", ["0-99999999999", "", "some", "6", "0-6", "-1", "1;2", "5-3"])
def test_a_choice_that_cannot_be_met_is_refused(choice):
    with pytest.raises(HpcmmError):
        profiled_ranks(choice, 6, 2)


@pytest.mark.nsys
def test_the_report_is_whole_and_the_command_s_exit_status_is_kept(tmp_path, nsys):
    report = tmp_path / "rank_0000.nsys-rep"
    code = "import nvtx, sys\nwith nvtx.annotate('x', domain='hpcmm'): pass\nsys.exit(3)"
    profile = [nsys, "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none"]
    for attempt in (1, 2):
        assert run_under_nsys(profile, [sys.executable, "-c", code], report, tmp_path / f"before_{attempt}") == 3
    assert sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*.*")) == [
        "before_2/rank_0000.nsys-rep",
        "rank_0000.nsys-rep",
    ]
    assert report.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("latest", "kind", "finished"),
    [
        (None, AnomalyConfig, False),
        ("step_000009", AnomalyConfig, False),
        ("step_000010", AnomalyConfig, True),
        ("step_000010", RunConfig, False),
        ("nonsense", AnomalyConfig, False),
    ],
)
def test_a_run_with_all_its_steps_is_not_profiled_once_more(tmp_path, latest, kind, finished):
    run = RunDir(tmp_path / "run")
    run.create()
    if latest is not None:
        (run.checkpoints / "latest").write_text(latest)
    config = kind(train=AnomalyTrainConfig(steps=10))
    assert is_finished(config, run) is finished


@pytest.mark.parametrize(
    "words", [["rank"], ["rank", "somewhere", "--"], ["prepare"], ["port", "--wait"], ["ranks", "x"], []]
)
def test_a_call_without_all_of_its_words_is_told_how_to_call(capsys, words):
    assert main(words) == 2
    assert "python -m hpcmm.worker rank RUN_DIR [-- COMMAND...]" in capsys.readouterr().err


def test_a_rank_without_a_configuration_is_one_sentence_and_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    run = RunDir(tmp_path / "run")
    run.create()
    assert main(["rank", str(run.root), "--", "true"]) == 1
    assert capsys.readouterr().err.startswith("hpcmm: ")
    record = json.loads(failures.exit_file(failures.attempt_folder(run), 3).read_text(encoding="utf-8"))
    assert (record["rank"], record["status"], record["signal"]) == (3, 1, None)


def test_a_run_that_cannot_be_prepared_is_one_sentence_and_no_attempt(tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    run.create()
    assert main(["prepare", str(run.root)]) == 1
    assert capsys.readouterr().err.startswith("hpcmm: ")
    assert not run.attempts.exists()


def test_a_wrong_call_is_told_how_to_call(capsys):
    assert main(["somewhere"]) == 2
    assert "usage: python -m hpcmm.worker prepare RUN_DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("local_rank", "world_size", "node_id", "asked"),
    [(0, 4, "1", [("n0", 23456, False)]), (0, 4, "0", [("n0", 23456, True)]), (1, 4, "1", []), (0, 1, "0", [])],
)
def test_the_first_rank_of_each_node_sees_whether_it_reaches_rank_0(
    monkeypatch, local_rank, world_size, node_id, asked
):
    seen = []

    def reaches(host, port, *, on_its_node, patience_s):
        seen.append((host, port, on_its_node))
        assert 0 < patience_s <= 20

    monkeypatch.setattr(network, "rendezvous_problem", reaches)
    monkeypatch.setenv("SLURM_NODEID", node_id)
    check_rendezvous(RankEnvironment(2, local_rank, world_size, 2, "7", "n1", "n0", 23456), RunConfig())
    assert seen == asked


def test_a_rank_that_cannot_reach_rank_0_says_rank_node_and_address(monkeypatch):
    monkeypatch.setattr(network, "rendezvous_problem", lambda host, *_, **__: f"{host} does not resolve (unknown)")
    with pytest.raises(HpcmmError, match=r"^rank 2 on n1: MASTER_ADDR n0 does not resolve \(unknown\), so"):
        check_rendezvous(RankEnvironment(2, 0, 4, 2, "7", "n1", "n0", 23456), RunConfig())


def test_the_job_s_nodes_are_printed_with_commas(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[08-10],m1")
    assert main(["nodes"]) == 0
    assert capsys.readouterr().out == "n08,n09,n10,m1\n"
