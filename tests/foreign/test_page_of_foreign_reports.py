"""Page, summary and trace of reports that hpcmm did not make: what GPUs did, also without steps."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from hpcmm.analyze import Analysis, analyze
from hpcmm.page.html import folded
from hpcmm.page.outputs import escape_whole, summary
from hpcmm.page.timeline import timeline
from hpcmm.page.wait_charts import child_waits

INPUTS = Path(__file__).parent / "inputs"
DOING = {"computation", "copies", "idle: until the host launches"}


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return analyze(INPUTS / "sync_then_loading", tmp_path_factory.mktemp("loading"))


@pytest.mark.parametrize(
    ("source", "titles"),
    [
        ("sync_then_loading", ["Top kernels", "Copies", "Idle time of the GPUs by cause", "NVTX ranges on the GPUs"]),
        ("offload_pinned", ["Top kernels", "Copies"]),
        ("cpu_torchrun_plain", []),
    ],
)
def test_the_summary_has_the_tables_of_gpus_that_hold_anything(source: str, titles: list[str], tmp_path: Path) -> None:
    analyze(INPUTS / source, tmp_path)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    every = ["Top kernels", "Copies", "Idle time of the GPUs by cause", "NVTX ranges on the GPUs"]
    assert [title for title in every if f"\n{title}:\n" in text] == titles


@pytest.mark.parametrize("source", ["sync_then_loading", "cpu_torchrun_plain", "graph_trace"])
def test_the_page_has_no_table_without_rows(source: str) -> None:
    assert all(table.rows for table in folded(analyze(INPUTS / source).study))


def test_steps_are_lost_only_if_there_are_some(tmp_path: Path) -> None:
    for source, heading in (("sync_then_loading", "lost a step"), ("offload_pinned", "lost")):
        analyze(INPUTS / source, tmp_path / source)
        assert f"| cause | {heading} |" in (tmp_path / source / "summary.md").read_text(encoding="utf-8")


def test_what_a_gpu_does_is_on_the_timeline(loading: Analysis) -> None:
    data = timeline(loading.study)
    assert [lane["name"] for lane in data["lanes"]] == ["rank 0", "GPU 0 of rank 0"]
    assert set(data["phases"]) >= DOING
    assert data["lanes"][1]["phases"] > 80


def test_what_a_gpu_does_is_in_the_trace(loading: Analysis) -> None:
    with gzip.open(loading.out / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    (thread,) = [event["tid"] for event in events if event.get("args", {}).get("name") == "GPU 0: what it does"]
    mine = sorted(
        (event["ts"], event["dur"], event["name"]) for event in events if event["tid"] == thread and "ts" in event
    )
    assert {name for _, _, name in mine} == DOING
    assert all(begin + length <= after[0] + 0.001 for (begin, length, _), after in itertools.pairwise(mine))
    idle_us = sum(length for _, length, name in mine if name.startswith("idle"))
    assert idle_us / 1e6 == pytest.approx(loading.idle()["idle_s"].sum(), rel=0.01)


def test_the_summary_holds_the_evidence_as_a_whole() -> None:
    analysis = analyze(INPUTS / "capture_repeat")
    evidence = str(analysis.bottlenecks().iloc[0]["evidence"])
    assert len(evidence) > 300
    assert escape_whole(evidence) in summary(analysis.study)


def test_a_launcher_s_waits_are_in_a_row_of_its_own() -> None:
    study = analyze(INPUTS / "cpu_torchrun_plain").study
    found = child_waits(study)
    assert found is not None
    assert [band.label for band in found.bands] == [f"launcher beside {study.names[-1]}"]
    assert found.verdicts[0].ranks == found.bands[0].label
