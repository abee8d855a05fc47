"""Verdicts on recorded runs of the local cluster whose fault is known (``record.py`` records them afresh)."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from faults import FAULTS, Fault

from hpcmm.analyze import analyze

RECORDINGS = Path(__file__).parent / "recordings"
OFFSET_NS, DRIFT = 4_100_000, -13e-6
SHIFTED_NODE_RANKS = (4, 5)
SHIFTED = [
    name
    if name in {"clean", "slow_forward", "slow_data", "slow_link", "stopped"}
    else pytest.param(name, marks=pytest.mark.long)
    for name in FAULTS
]
"""A cause of each kind; `make test-all` shifts the clock of all recordings."""


@pytest.fixture(scope="module", params=FAULTS)
def recorded(request) -> tuple[str, dict[str, pd.DataFrame]]:
    return request.param, analyze([RECORDINGS / request.param]).tables


@pytest.fixture(scope="module", params=SHIFTED)
def shifted(request, tmp_path_factory) -> tuple[str, dict[str, pd.DataFrame]]:
    """The same with one node's clock ahead and slow: node 3, so that it is once the culprit's and else a waiter's."""
    copy = tmp_path_factory.mktemp("shifted") / request.param
    shutil.copytree(RECORDINGS / request.param, copy)
    for rank in SHIFTED_NODE_RANKS:
        shift_clock(copy / "nsys" / f"rank_{rank:04d}.sqlite")
    return request.param, analyze([copy]).tables


def shift_clock(export: Path) -> None:
    with sqlite3.connect(export) as connection:
        for table in ("NVTX_EVENTS", "OSRT_API"):
            changes = ", ".join(f'"{at}" = "{at}" + CAST(round("{at}" * ?) AS INTEGER)' for at in ("start", "end"))
            connection.execute(f"UPDATE {table} SET {changes}", (DRIFT, DRIFT))  # noqa: S608 -- our own names
        connection.execute("UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = utcEpochNs + ?", (OFFSET_NS,))
    connection.close()


def test_the_first_row_names_the_culprit_and_the_cause(recorded) -> None:
    name, tables = recorded
    check(FAULTS[name], tables["bottlenecks"])


def test_a_shifted_clock_changes_no_verdict(shifted) -> None:
    name, tables = shifted
    check(FAULTS[name], tables["bottlenecks"])


def check(fault: Fault, table: pd.DataFrame) -> None:
    first = table.iloc[0]
    named = {
        (str(row["cause"]), None if pd.isna(row["rank"]) else int(row["rank"]), row["node"])
        for row in table.to_dict("records")
        if row["node"]
    }
    assert first["cause"].startswith(fault.cause)
    if fault.phase:
        assert first["phase"] == fault.phase
    expected = {(str(first["cause"]), fault.rank, fault.node)} if fault.node else set()
    assert named == expected | set(fault.also), "and nobody else is named"
    if fault.node:
        assert first["node"] == fault.node
        assert first["confidence"] in {"high", "medium"}


def test_the_clock_table_shows_the_shift_within_its_error(shifted) -> None:
    _, tables = shifted
    clock = tables["clock"].set_index("node")
    offset = clock["offset_s"] - clock.loc["node1", "offset_s"]
    assert abs(offset["node3"] - OFFSET_NS / 1e9) <= clock.loc["node3", "error_s"] + clock.loc["node1", "error_s"]
    assert offset.drop("node3").abs().max() < OFFSET_NS / 1e9
    assert clock["error_s"].max() < 0.05


def test_losses_add_up_to_no_more_than_the_step(recorded) -> None:
    _, tables = recorded
    assert 0 < tables["bottlenecks"]["step_share"].sum() <= 1.0


def test_each_verdict_points_to_rows_that_exist(recorded) -> None:
    _, tables = recorded
    for pointer in tables["bottlenecks"]["evidence_rows"]:
        table, _, filters = pointer.partition(": ")
        rows = tables[table]
        for column, value in parse(filters):
            rows = rows[rows[column].astype(str) == value]
        assert len(rows) > 0, pointer


def parse(filters: str) -> list[tuple[str, str]]:
    """``rank=4 phase=subprocess in forward step=2``: a value runs on to the next word with a ``=``."""
    found: list[tuple[str, str]] = []
    for word in filters.split(" "):
        if "=" in word:
            column, value = word.split("=", 1)
            found.append((column, value))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {word}")
    return found
