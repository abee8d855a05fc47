"""Ranks that only NCCL's own ranges tell: around ncclCommInitRank, as JSON or as bytes with a schema."""

import json
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcmm.analyze import analyze

INPUTS = Path(__file__).parent / "inputs"
ENTRIES = (
    "CREATE TABLE NVTX_PAYLOAD_SCHEMA_ENTRIES (domainId, schemaId, idx, flags, type, name, description, x, offset)"
)
FIELDS = (("NCCL communicator ID", 18, None), ("No. of ranks", 5, 8), ("Rank", 5, 12), ("CUDA device", 5, 16))
JOINED = "jsonText LIKE '%No. of ranks%'"


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return shutil.copytree(INPUTS / "nccl_init_rank", tmp_path / "reports")


def edit(report: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(report) as connection:
        connection.execute(statement, values)
    connection.close()


def joins(report: Path, **other: int) -> None:
    """Let the process of ``report`` tell other fields of what it joins."""
    with sqlite3.connect(report) as connection:
        (text,) = connection.execute(f"SELECT jsonText FROM NVTX_EVENTS WHERE {JOINED}").fetchone()  # noqa: S608
        fields = json.loads(text) | {name.replace("_", " "): value for name, value in other.items()}
        connection.execute(f"UPDATE NVTX_EVENTS SET jsonText = ? WHERE {JOINED}", (json.dumps(fields),))  # noqa: S608
    connection.close()


def ranks(reports: Path) -> dict[int, str]:
    table = analyze(reports).coverage()
    return dict(zip(table["rank"], table["report"], strict=True))


def in_bytes(report: Path) -> None:
    with sqlite3.connect(report) as connection:
        (text,) = connection.execute(f"SELECT jsonText FROM NVTX_EVENTS WHERE {JOINED}").fetchone()  # noqa: S608
        told = json.loads(text)
        values = [told[name] for name, _, _ in FIELDS]
        blob = struct.pack("<QQQQQiii", 1, 77, 20, 52, *values).hex()
        connection.execute(ENTRIES)
        rows = [(1, 77, index, None, kind, name, None, None, at) for index, (name, kind, at) in enumerate(FIELDS)]
        connection.executemany("INSERT INTO NVTX_PAYLOAD_SCHEMA_ENTRIES VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        connection.execute(f"UPDATE NVTX_EVENTS SET jsonText = NULL, binaryData = ? WHERE {JOINED}", (blob,))  # noqa: S608
    connection.close()


@pytest.mark.parametrize("written", [lambda _: None, in_bytes], ids=["JSON", "bytes"])
def test_the_place_in_the_largest_communicator_is_the_rank(reports: Path, written: Callable[[Path], None]) -> None:
    for name in ("p0", "p1"):
        written(reports / f"{name}.sqlite")
    assert ranks(reports) == {0: "p1.sqlite", 1: "p0.sqlite"}
    late = analyze(reports).bottlenecks().dropna(subset=["rank"])
    assert list(late["rank"]) == [0]


def test_the_environment_goes_before_nccl(reports: Path) -> None:
    for name, rank in (("p0", 0), ("p1", 1)):
        told = f'RANK="{rank}"'
        edit(
            reports / f"{name}.sqlite",
            "INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:ENVIRONMENT_VARIABLE', ?)",
            told,
        )
    assert ranks(reports) == {0: "p0.sqlite", 1: "p1.sqlite"}


@pytest.mark.parametrize(
    "other",
    [{"NCCL_communicator_ID": 7}, {"Rank": 2}, {"No._of_ranks": 4}],
    ids=["another communicator", "no place of it", "another size"],
)
def test_processes_that_disagree_keep_their_ranks_unknown(reports: Path, other: dict[str, int]) -> None:
    joins(reports / "p0.sqlite", **other)
    assert min(ranks(reports)) < 0


def test_a_rank_that_no_report_is_of_is_missing(reports: Path) -> None:
    for name in ("p0", "p1"):
        joins(reports / f"{name}.sqlite", **{"No._of_ranks": 3})
    assert sorted(ranks(reports)) == [0, 1, 2]


def test_a_smaller_group_than_the_world_tells_no_rank(reports: Path) -> None:
    for name in ("p0", "p1"):
        edit(
            reports / f"{name}.sqlite",
            "INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:ENVIRONMENT_VARIABLE', 'WORLD_SIZE=\"8\"')",
        )
    table = analyze(reports).coverage()
    assert list(table["rank"].dropna()) == [-2, -1]
    assert len(table) == 8
