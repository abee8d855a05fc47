"""The numbers behind the drawings, before the browser sees them."""

import base64
import itertools
import re
import zlib
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from large_study import SLOW_RANK, large_study

from hpcmm.analysis.study import Study
from hpcmm.analyze import Analysis
from hpcmm.page import timeline as timeline_module
from hpcmm.page.headlines import rank_list, size
from hpcmm.page.html import coverage_grid
from hpcmm.page.step_charts import (
    MAX_POINTS,
    device_bars,
    efficiency,
    kinds,
    ordered,
    rank_bars,
    step_budget,
    step_plot,
)
from hpcmm.page.timeline import timeline, worst_step
from hpcmm.page.wait_charts import bandwidth, child_waits, wait_matrix

# Linear-light matrices for full loss of one cone type: Machado, Oliveira and Fernandes 2009.
VISION = {
    "usual": np.eye(3),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
SMALLEST_DIFFERENCE = 12.0
"""CIELAB distance that is plain to see between two areas side by side."""


@pytest.fixture(scope="module")
def medium(slow_data: Analysis) -> Study:
    return large_study(slow_data.study, ranks=72, steps=12)


def with_tables(study: Study, **tables: pd.DataFrame) -> Study:
    return replace(study, tables={**study.tables, **tables})


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def linear(colour: str) -> np.ndarray:
    channel = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("dark", [False, True])
def test_colours_differ_for_every_kind_of_vision(vision: str, dark: bool) -> None:
    style = (files("hpcmm.page") / "assets" / "report.css").read_text()
    light, night = style.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    if dark:
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", night.split(":root[data-theme")[0]))
    names = ["data", "forward", "backward", "optimizer", "checkpoint", "other", "wait", "transfer"]
    seen = {name: lab(VISION[vision] @ linear(colours[name])) for name in names}
    distances = {
        (first, second): float(np.linalg.norm(seen[first] - seen[second]))
        for first, second in itertools.combinations(names, 2)
    }
    assert min(distances.values()) > SMALLEST_DIFFERENCE, min(distances, key=distances.__getitem__)


def test_unusual_phases_get_colours_of_their_own() -> None:
    names = ordered(["other", "generate", "backward", "data", "allocate"])
    assert names == ["data", "backward", "allocate", "generate", "other"]
    assert kinds(names) == ["data", "backward", "extra-0", "extra-1", "other"]


def test_the_parts_of_a_step_add_up_to_it(slow_data: Analysis) -> None:
    budget = step_budget(slow_data.study)
    chart = rank_bars(slow_data.study)
    assert budget is not None
    assert chart is not None
    assert sum(part.width for part in budget.parts) == pytest.approx(100, abs=2)
    for before, after in itertools.pairwise(budget.parts):
        assert after.start >= before.start + before.width - 0.01
    assert [bar.label for bar in chart.bars] == [f"rank {rank} · node{rank // 2 + 1}" for rank in range(4)]
    of_rank_2 = {part.name: part.width for part in chart.bars[2].parts}
    of_rank_0 = {part.name: part.width for part in chart.bars[0].parts}
    assert of_rank_2["data"] > 3 * of_rank_0["data"]


def test_of_many_ranks_the_extremes_are_drawn(medium: Study) -> None:
    chart = rank_bars(medium)
    assert chart is not None
    assert len(chart.bars) == 64
    assert chart.left_out == 8
    assert f"rank {SLOW_RANK} · node1" in {bar.label for bar in chart.bars}


def test_gpu_bars_add_up_to_the_span(slow_data: Analysis) -> None:
    row = {
        "rank": 0, "node": "n", "pid": 7, "device": 0, "step": 3, "span_s": 1.0, "compute_s": 0.6, "comm_s": 0.3,
        "memory_s": 0.1, "overlap_s": 0.2, "exposed_comm_s": 0.1, "idle_s": 0.15, "idle_host_s": 0.1, "set_s": 0.02,
        "shared_s": 0.05, "untraced_s": 0.03,
    }  # fmt: skip
    gpu = pd.DataFrame([row, {**row, "device": 1, "rank": -2, "span_s": 0.5, "compute_s": 0.1}])
    chart = device_bars(with_tables(slow_data.study, gpu=gpu))
    assert chart is not None
    assert [bar.label for bar in chart.bars] == ["GPU 1 of process 7 · n", "GPU 0 of rank 0 · n"]
    widths = {part.name: part.width for part in chart.bars[1].parts}
    assert widths == {
        "computation": pytest.approx(40),
        "computation and communication": pytest.approx(20),
        "exposed communication": pytest.approx(10),
        "copies": pytest.approx(5),
        "memory sets": pytest.approx(2),
        "used by other processes": pytest.approx(5),
        "no records": pytest.approx(3),
        "idle: the host launched too late": pytest.approx(10),
        "idle: other": pytest.approx(5),
    }


def test_more_ranks_than_fit_become_nodes(medium: Study) -> None:
    matrix = wait_matrix(medium)
    assert matrix is not None
    assert matrix.of == "node"
    assert matrix.labels == [f"node{number}" for number in range(1, 10)]
    assert matrix.told.startswith("node1 is waited for most")
    strongest = max(matrix.cells, key=lambda cell: cell.shade)
    assert strongest.column == 0
    # The mean over the waiting node's ranks of what they waited for the other node's.
    waits = medium.wait_matrix
    assert float(strongest.text) == pytest.approx(
        waits[strongest.row * 8 : strongest.row * 8 + 8, :8].sum() / 8 * 1e3, 0.01
    )


def test_the_matrix_names_who_is_waited_for(slow_data: Analysis) -> None:
    matrix = wait_matrix(slow_data.study)
    assert matrix is not None
    assert matrix.told.startswith("rank 2 is waited for most")
    assert {cell.column for cell in matrix.cells if cell.shade > 0.5} == {2}
    assert wait_matrix(replace(slow_data.study, wait_matrix=np.zeros((4, 4)))) is None


def test_the_efficiency_tree_leaves_out_what_is_not_known(slow_data: Analysis) -> None:
    run = {
        "scope": "run", "step": pd.NA, "phase": "", "parallel_efficiency": 0.63, "load_balance": 0.7,
        "load_balance_in_node": 0.95, "load_balance_between_nodes": 0.74, "communication_efficiency": 0.9,
        "serialisation_efficiency": 0.92, "transfer_efficiency": 0.98, "computation_scaling": np.nan,
        "global_efficiency": np.nan,
    }  # fmt: skip
    table = pd.DataFrame([run, {**run, "scope": "phase", "phase": "data", "transfer_efficiency": np.nan}])
    found = efficiency(with_tables(slow_data.study, efficiency=table))
    assert found is not None
    assert (found.tree.name, found.tree.text, found.tree.grade) == ("Parallel efficiency", "63%", "poor")
    assert [child.name for child in found.tree.children] == ["Load balance", "Communication efficiency"]
    assert [child.grade for child in found.tree.children[1].children] == ["good", "good"]
    assert found.phases == [("data", [("63%", "poor"), ("70%", "poor"), ("90%", "good"), ("", "none")])]
    scaled = table.assign(computation_scaling=1.1, global_efficiency=0.69)
    whole = efficiency(with_tables(slow_data.study, efficiency=scaled))
    assert whole is not None
    assert [child.name for child in whole.tree.children] == ["Parallel efficiency", "Computation scaling"]
    assert whole.tree.children[1].width == 100
    assert efficiency(with_tables(slow_data.study, efficiency=table.head(0))) is None


def test_waits_for_children_say_what_they_are(slow_data: Analysis) -> None:
    windows = pd.DataFrame(
        [
            (0, "launcher", "benign supervision", 0.0, 20.0, 2, 19.5),
            (1, "launcher", "benign supervision", 0.0, 20.0, 900, 0.1),  # looks now and then
            (1, "worker", "within step", 9.0, 9.4, 3, 0.3),
        ],
        columns=["rank", "role", "verdict", "start_s", "end_s", "calls", "union_s"],
    )
    found = child_waits(with_tables(slow_data.study, waitpid_windows=windows))
    assert found is not None
    assert [row.verdict for row in found.verdicts] == ["within step", "benign supervision"]
    assert found.verdicts[1].ranks == "launcher beside 0-1"
    assert found.verdicts[1].window == "0 s to 20 s"
    assert "costs time" in found.verdicts[0].meaning
    assert [band.label for band in found.bands] == ["launcher beside rank 0", "rank 1", "launcher beside rank 1"]
    assert [(part.start, part.width) for band in found.bands[1:] for part in band.parts] == [(45, 2), (0, 100)]
    assert found.steps is not None
    assert 0 < found.steps[0] < 100
    assert child_waits(with_tables(slow_data.study, waitpid_windows=windows.head(0))) is None


def test_a_long_run_is_plotted_in_bins(medium: Study) -> None:
    steps = 10 * MAX_POINTS
    table = pd.DataFrame({"rank": 0, "step": np.arange(steps), "duration_s": 0.1})
    table.loc[777, "duration_s"] = 5.0
    plot = step_plot(with_tables(medium, steps=table))
    assert plot is not None
    assert len(plot.points["step"]) == MAX_POINTS
    assert max(plot.points["max"]) == 5.0, "an outlier must not vanish in its bin"
    assert plot.y_ticks[0] == (100.0, "0 s")
    assert plot.y_ticks[-1][0] == 0.0
    assert step_plot(with_tables(medium, steps=table.head(0))) is None
    single = step_plot(with_tables(medium, steps=table.head(1)))
    assert single is not None
    assert single.points["step"] == [0]


def test_bandwidth_is_told_by_operation_and_size(slow_data: Analysis) -> None:
    rows, left_out = bandwidth(slow_data.study)
    assert left_out == 0
    assert {(row.op, row.size) for row in rows} == {("all_reduce", "262 kB"), ("all_reduce", "4 B")}
    assert all(row.low <= row.middle <= row.low + row.width for row in rows)
    nothing = slow_data.tables["collectives"].assign(bus_bytes_per_s=0.0)
    assert bandwidth(with_tables(slow_data.study, collectives=nothing)) == ([], 0)


def test_the_worst_step_is_where_the_blamed_rank_is_latest(medium: Study) -> None:
    phases = medium.tables["phases"].copy()
    late = (phases["rank"] == SLOW_RANK) & (phases["step"] == 7) & (phases["phase"] == "data")
    phases.loc[late, "duration_s"] += 1.0
    study = with_tables(medium, phases=phases)
    row = {"rank": SLOW_RANK, "node": "node1", "phase": "data", "cause": "data loading"}
    assert worst_step(study, row) == 7
    assert worst_step(study, {**row, "worst_step": 3}) == 3
    assert worst_step(study, {**row, "rank": pd.NA, "phase": "no such phase"}) in medium.steps.numbers


def test_coverage_says_what_is_missing(slow_data: Analysis) -> None:
    table = slow_data.tables["coverage"].copy()
    table.loc[3, ["status", "reason"]] = ["missing", "killed"]
    grid = coverage_grid(with_tables(slow_data.study, coverage=table))
    assert [tile.grade for tile in grid.tiles] == ["good", "good", "good", "poor"]
    assert grid.troubles == [("rank 3 · node2", "missing", "killed")]


def test_the_timeline_packs_every_segment(slow_data: Analysis) -> None:
    study = slow_data.study
    data = timeline(study)
    arrays = {
        key: np.frombuffer(
            np.frombuffer(zlib.decompress(base64.b64decode(data["phase"][key])), np.uint8)
            .reshape(width, -1)
            .T.tobytes(),
            kind,
        )
        for key, width, kind in (("gap", 4, np.uint32), ("length", 4, np.uint32), ("step", 4, np.int32))
    }
    at = 0
    for lane, trace in zip(data["lanes"], study.traces, strict=True):
        own = slice(at, at + lane["phases"])
        ends = np.cumsum(arrays["gap"][own].astype(np.int64) + arrays["length"][own])
        drawn = trace.segments[trace.segments["phase"] != "other"]
        assert set(drawn["end_ns"] // data["unit_ns"]) <= set(ends.tolist())
        assert set(arrays["step"][own]) == set(trace.segments["step"])
        at += lane["phases"]
    assert at == len(arrays["gap"])


def test_a_page_holds_at_most_so_many_segments(slow_data: Analysis, monkeypatch) -> None:
    monkeypatch.setattr(timeline_module, "MAX_SEGMENTS", 100)
    monkeypatch.setattr(timeline_module, "MAX_COLLECTIVES", 50)
    data = timeline(slow_data.study)
    assert sum(lane["phases"] for lane in data["lanes"]) <= 100
    assert sum(lane["comm"] for lane in data["lanes"]) == 50
    assert data["left_out"]["phases"] > 0
    assert data["left_out"]["collectives"] == len(slow_data.study.collectives) - 50


def test_short_texts() -> None:
    assert rank_list([3, 0, 1, 2, 7, pd.NA]) == "0-3, 7"
    assert [size(value) for value in (0, 4, 262144, 5.4e7, 2e15)] == ["0 B", "4 B", "262 kB", "54 MB", "2e+03 TB"]
