"""What GPUs lose, as rows of ``bottlenecks``: made-up runs of known times, and two H100s."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from slow_gpu import SlowGpuRun
from synthetic_gpu import GpuRun

from hpcmm.analysis.findings import Finding
from hpcmm.analysis.gpu_findings import excess, in_steps, of_capture
from hpcmm.analysis.suggestions import suggest
from hpcmm.analyze import Analysis, analyze
from hpcmm.page.headlines import gpu_line, headline


def by_cause(analysis: Analysis) -> pd.DataFrame:
    return analysis.bottlenecks().set_index("cause")


def test_idle_gpus_are_a_row_and_the_headline_says_the_same(gpu_run: Analysis) -> None:
    row = gpu_run.bottlenecks().iloc[0]
    assert row["cause"] == "GPU idle: the host launches late"
    assert row["lost_s_per_step"] == pytest.approx(2.4e-3)
    assert "idle until the host has launched more: 0.0024 s a step" in row["evidence"]
    assert headline(gpu_run.study) == "GPU idle: the host launches late costs 2.4 ms of each 12 ms step (20%)."
    rows = by_cause(gpu_run)
    transfer = rows[rows.index.str.startswith("communication transfer")]
    assert transfer["lost_s_per_step"].sum() == pytest.approx(1e-3)


def test_a_host_that_waits_for_its_gpu_is_told_from_one_that_is_late(tmp_path: Path) -> None:
    run = analyze(GpuRun(host_waits=True).write(tmp_path / "run"))
    rows = by_cause(run)
    assert rows.loc["GPU idle: the host waits for it first", "lost_s_per_step"] == pytest.approx(0.3e-3)
    assert rows.loc["GPU idle: the host launches late", "lost_s_per_step"] == pytest.approx(2.1e-3)
    assert ".item()" in rows.loc["GPU idle: the host waits for it first", "suggestion"]
    gpu = run.gpu()
    assert gpu.loc[gpu["step"] == 5, "idle_sync_s"].to_numpy() == pytest.approx(0.3e-3)


def test_without_steps_the_whole_capture_counts_as_one(tmp_path: Path) -> None:
    run = analyze(GpuRun(steps=20, annotated=False, late_ms=2.0, ranks_per_report=2).write(tmp_path / "run"))
    rows = by_cause(run)
    gpu = run.gpu()
    host = (gpu["idle_host_s"] - gpu["idle_sync_s"]).mean()
    assert rows.loc["GPU idle: the host launches late", "lost_s_per_step"] == pytest.approx(host)
    assert rows["step_share"].max() == pytest.approx(host / gpu["span_s"].mean())
    waited = gpu["comm_wait_s"].clip(upper=gpu["exposed_comm_s"]).mean()  # computation hides the rest
    assert rows.loc["imbalance between GPUs", "lost_s_per_step"] == pytest.approx(waited)


def test_two_h100s(h100: Analysis) -> None:
    table = h100.bottlenecks()
    gpu = h100.gpu()
    assert list(table["cause"]) == [
        "GPU idle: the host launches late",
        "imbalance between GPUs",
        "communication transfer",
    ]
    idle = h100.idle()
    assert table["lost_s_per_step"].iloc[0] == pytest.approx(
        idle.loc[idle["cause"] == "host code or OS call", "idle_s"].sum() / len(gpu)
    )
    assert idle["idle_s"].sum() == pytest.approx(gpu["idle_s"].sum())
    assert table["rank"].iloc[1] == gpu.loc[gpu["pid"] == 145, "rank"].iloc[0]
    assert "wait in collectives for GPU 1 of process 145 on modal" in table["evidence"].iloc[1]
    first = table.iloc[0]
    assert f"{first['step_share']:.1%}"[:-2] in headline(h100.study)
    assert first["cause"] in headline(h100.study)


def test_each_row_points_to_a_device_of_the_table(h100: Analysis) -> None:
    gpu = h100.gpu()
    for pointer in h100.bottlenecks()["evidence_rows"]:
        filters = dict(word.split("=") for word in pointer.partition(": ")[2].split())
        assert len(gpu[(gpu["rank"] == int(filters["rank"])) & (gpu["device"] == int(filters["device"]))]) == 1


def test_what_other_rows_explain_of_the_idle_time_is_not_counted_twice(gpu_run: Analysis) -> None:
    saving = Finding("checkpoint", "checkpoint on all ranks", 2e-3, None, "", "checkpoint", "", "medium")
    found = in_steps(gpu_run.gpu(), gpu_run.idle(), gpu_run.copies(), [saving])
    assert {finding.kind: finding.lost_s for finding in found}["gpu_host"] == pytest.approx(0.4e-3)


def test_a_late_ranks_gpu_tells_whether_it_computes_or_idles_longer(gpu_run: Analysis) -> None:
    gpu = gpu_run.gpu()
    assert excess(gpu, 1) == ("", "")
    slow = gpu["rank"] == 1
    longer = gpu.assign(compute_s=gpu["compute_s"] + 0.003 * slow)
    assert excess(longer, 1) == ("computes", "its GPU computes 0.003 s a step longer than its peers'")
    idler = gpu.assign(idle_s=gpu["idle_s"] + 0.002 * slow)
    assert excess(idler, 1) == ("is idle", "its GPU is idle 0.002 s a step longer than its peers'")


def test_no_gpu_no_rows() -> None:
    nothing = pd.DataFrame(columns=["step", "warmup"])
    assert in_steps(nothing, nothing, nothing, []) == of_capture({"gpu": nothing}) == []
    assert excess(nothing, 0) == ("", "")


@pytest.mark.few(4)
@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_a_slow_gpu_is_named_by_what_launched_its_kernels(tmp_path: Path, phase: str, ranks_per_node: int) -> None:
    """Its host, which runs ahead, waits longer in the optimizer alone."""
    run = SlowGpuRun(ranks_per_node=ranks_per_node, longer_ms={(2, phase): 8.0})
    row = analyze(run.write(tmp_path / "run")).bottlenecks().iloc[0]
    assert (row["cause"], row["rank"], row["phase"]) == ("computation", 2, phase)
    assert row["lost_s_per_step"] == pytest.approx(0.008, rel=0.1)
    assert "its GPU computes 0.008 s a step longer than its peers'" in row["evidence"]
    alone = "on node0: nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE, for a GPU that is slowed down"
    assert row["suggestion"] == (alone if ranks_per_node == 4 else f"sbatch --exclude=node{2 // ranks_per_node} ...")


@pytest.mark.parametrize("scatter_ms", [0.0, 30.0])
def test_no_gpu_is_named_if_none_takes_longer(tmp_path: Path, scatter_ms: float) -> None:
    """With ``scatter_ms`` each rank is late now and then, as behind a slow link."""
    table = analyze(SlowGpuRun(scatter_ms=scatter_ms).write(tmp_path / "run")).bottlenecks()
    assert table["rank"].isna().all()


def test_a_rank_that_loads_longer_while_its_gpu_has_nothing_to_do_is_named(tmp_path: Path) -> None:
    row = analyze(SlowGpuRun(longer_ms={(1, "data"): 8.0}).write(tmp_path / "run")).bottlenecks().iloc[0]
    assert (row["cause"], row["rank"], row["phase"]) == ("data loading", 1, "data")
    assert "its GPU is idle 0.008 s a step longer than its peers'" in row["evidence"]


@pytest.mark.parametrize(("phase", "cause"), [("data", "data loading"), ("forward", "computation")])
@pytest.mark.parametrize("buckets", [2, 8])
def test_buckets_that_run_beside_the_backward_pass_hide_no_cause(
    tmp_path: Path, buckets: int, phase: str, cause: str
) -> None:
    """The late rank has its backward pass before it when the others have theirs behind them, in each bucket."""
    run = SlowGpuRun(ranks_per_node=4, buckets=buckets, longer_ms={(1, phase): 8.0})
    table = analyze(run.write(tmp_path / "run")).bottlenecks()
    assert (table["cause"].iloc[0], table["rank"].iloc[0], table["phase"].iloc[0]) == (cause, 1, phase)
    assert table["rank"].notna().sum() == 1


@pytest.mark.parametrize(("steps", "named"), [(21, False), (46, True)])
def test_loading_that_shows_in_few_steps_because_hosts_run_ahead_is_not_said_to_be_of_batches(
    tmp_path: Path, steps: int, named: bool
) -> None:
    """A rank that loads longer is late only after its host has waited for its GPU, in each fifth step."""
    run = SlowGpuRun(4, 4, steps, {(1, "data"): 15.0}, runs_ahead=True, waits_every=5, buckets=2)
    table = analyze(run.write(tmp_path / "run")).bottlenecks()
    (row,) = [row for _, row in table.iterrows() if row["phase"] == "data"]
    assert row["cause"] == ("data loading" if named else "imbalance without a culprit")
    assert table["rank"].dropna().tolist() == ([1] if named else [])
    assert "uneven batches" not in table["cause"].tolist()


@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_a_step_lasts_as_long_as_its_gpus_work_if_hosts_run_ahead(tmp_path: Path, ranks_per_node: int) -> None:
    run = SlowGpuRun(ranks_per_node=ranks_per_node, runs_ahead=True, longer_ms={(2, "backward"): 8.0})
    analysis = analyze(run.write(tmp_path / "run"))
    row = analysis.bottlenecks().iloc[0]
    assert (row["cause"], row["rank"], row["phase"]) == ("computation", 2, "backward")
    assert row["lost_s_per_step"] == pytest.approx(0.008, rel=0.1)
    assert row["step_share"] == pytest.approx(8 / 46, rel=0.1)
    assert "from step to step" in headline(analysis.study)
    assert "of the time in steps, communicate" in gpu_line(analysis.study)


def test_what_a_host_that_runs_ahead_loads_is_hidden(tmp_path: Path) -> None:
    run = SlowGpuRun(ranks_per_node=4, runs_ahead=True, longer_ms={(2, "data"): 8.0})
    table = analyze(run.write(tmp_path / "run")).bottlenecks()
    assert table["rank"].isna().all()
    assert not table["cause"].str.contains("loading").any()


@pytest.mark.parametrize(
    ("gpu_excess", "told"),
    [("copies", "copies beside"), ("sets memory", "set less memory"), ("is idle", "sbatch --exclude=node1"),
     ("computes", "sbatch --exclude=node1")],
)  # fmt: skip
def test_no_other_node_is_advised_for_what_a_rank_copies_or_sets(gpu_excess: str, told: str) -> None:
    late = Finding("compute", "computation", 0.1, 1, "node1", "optimizer", "", "high", gpu_excess=gpu_excess)
    assert suggest(late, {}).startswith(told)


def test_a_gpu_that_is_late_since_it_idles_is_not_to_have_less_work() -> None:
    late = Finding("gpu_wait", "imbalance between GPUs", 0.1, 1, "node1", "", "", "medium", gpu_excess="is idle")
    assert "what its host does" in suggest(late, {})
    assert "as much to do" in suggest(replace(late, gpu_excess="computes"), {})
