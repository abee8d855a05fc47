"""Runs that lack something go through all tables, the page and the terminal."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from simulated import everyone, simulate_program

from hpcmm.analysis.extraction import ReportFacts
from hpcmm.analysis.osrt import OSRT_COLUMNS
from hpcmm.analysis.pipeline import study
from hpcmm.analysis.report_inventory import take_inventory
from hpcmm.page.outputs import write_outputs
from hpcmm.page.terminal import print_study
from hpcmm.reports.report import Identity
from hpcmm.reports.run_record import RunRecord

WORK = {"data": 5.0, "forward": 20.0, "backward": 30.0, "between": 1.0}
PROGRAM = ["data", "forward", ("forward", everyone), "backward", ("backward", everyone)]


def run(ranks=4, steps=6):
    return simulate_program(
        PROGRAM, lambda r, _s, p: WORK[p] + 40 * ((r, p) == (1, "forward")), ranks=ranks, steps=steps
    )


def outputs(traces, folder: Path) -> str:
    """What the terminal says; every file is written as well."""
    facts = [
        ReportFacts(
            Path(trace.report),
            traces=(replace(trace, osrt=pd.DataFrame(columns=OSRT_COLUMNS)),),
            identity=Identity(trace.rank, None, trace.node),
            epoch_ns=0,
            events=5,
            no_ranges="" if len(trace.steps) else "no steps",
        )
        for trace in traces
    ]
    made = study(take_inventory(facts, RunRecord()), RunRecord(), lambda _what, _done, _of: None)
    write_outputs(made, folder / "out")
    told = io.StringIO()
    print_study(made, folder, Console(file=told, width=200))
    return told.getvalue()


def with_collectives(change, traces):
    return [replace(trace, collectives=change(trace.collectives, trace.rank)) for trace in traces]


def without_steps(trace):
    return replace(trace, steps=trace.steps.iloc[:0], segments=trace.segments.iloc[:0])


COLLECTIVES = {
    "none": lambda rows, _rank: rows.iloc[:0],
    "in the first step alone": lambda rows, _rank: rows[rows["step"] == 0],
    "in one step alone": lambda rows, _rank: rows[rows["step"] == 1],
    "outside the steps alone": lambda rows, _rank: rows.assign(step=-1, phase=""),
    "on one rank alone": lambda rows, rank: rows[rows["step"] > 99 * rank],
    "without an end": lambda rows, _rank: rows.assign(closed=False),
    "that take no time": lambda rows, _rank: rows.assign(end_ns=rows["start_ns"]),
    "sends to nobody": lambda rows, _rank: rows.assign(op="send"),
    "receives from who sends none": lambda rows, rank: rows.assign(op="recv", peer=rank + 1),
    "without bytes": lambda rows, _rank: rows.assign(op="barrier", bytes=0),
}


@pytest.mark.few(11)
@pytest.mark.parametrize(("ranks", "steps"), [(1, 6), (2, 1), (4, 6)])
@pytest.mark.parametrize("change", COLLECTIVES.values(), ids=COLLECTIVES)
def test_collectives(change, ranks: int, steps: int, tmp_path: Path) -> None:
    told = outputs(with_collectives(change, run(ranks, steps)), tmp_path)
    assert ("5 steps of" if steps > 1 else "step 0 alone, of") in told


def test_without_steps_the_headline_tells_what_collectives_take(tmp_path: Path) -> None:
    traces = [replace(without_steps(trace), node="node1") for trace in run()]
    told = " ".join(outputs(traces, tmp_path).split())
    assert ". From its first collective to its last a rank spends " in told
    assert " of it is waiting" in told


def test_without_steps_the_headline_tells_what_phases_take(tmp_path: Path) -> None:
    traces = [
        replace(without_steps(trace), segments=trace.segments[trace.segments["phase"] != "other"].assign(step=-1))
        for trace in run()
    ]
    told = " ".join(outputs(traces, tmp_path).split())
    assert re.search(r"\. Phases of a rank, in all: forward [0-9.]+ m?s(, \w+ [0-9.]+ m?s)*\. ", told)


STEPS = {
    "none": without_steps,
    "on rank 0 alone": lambda trace: without_steps(trace) if trace.rank else trace,
    "on all but rank 0": lambda trace: trace if trace.rank else without_steps(trace),
    "others on each rank": lambda trace: replace(
        trace,
        **{
            name: getattr(trace, name).assign(step=getattr(trace, name)["step"] + 10 * trace.rank)
            for name in ("steps", "segments", "collectives")
        },
    ),
    "without phases": lambda trace: replace(trace, segments=trace.segments.assign(phase="other")),
    "without segments": lambda trace: replace(trace, segments=trace.segments.iloc[:0]),
    "without OS calls": lambda trace: replace(trace, blocked=None),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("change", STEPS.values(), ids=STEPS)
def test_steps(change, tmp_path: Path) -> None:
    assert "ranks with steps" in outputs([change(trace) for trace in run()], tmp_path)
