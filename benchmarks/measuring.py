"""What the benchmarks share: medians and ratios, ranks, and the option ``--json FILE`` with the file that it asks for.

The file holds one JSON object: the benchmark's name, the machine's cores, what the units in the names of numbers mean,
and ``rows``, an object for each thing that was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcmm.files import write_whole

Row = dict[str, object]
"""What was measured of one thing, by names such as ``wall_median_s``."""

UNITS = {"_per_s": "a second", "_s": "seconds", "_mb": "megabytes (10^6 bytes)", "_gib": "gibibytes (2^30 bytes)"}
"""Meanings of the ends of names; a longer end goes before a shorter one that it contains."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line: its docstring, and ``--json``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=new_file, metavar="FILE", help="also write the results to this file, as JSON")
    return made


def new_file(text: str) -> Path:
    """An argument's file, refused at once if it could not be written after a long measurement."""
    path = Path(text).resolve()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is no file")
    return path


def positive(text: str) -> int:
    """An argument that counts repetitions."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def run_ranks(program: Sequence[str], ranks: int, **environment: str) -> list[int]:
    """Run a Python program as ranks that can meet on this machine, a thread each. Their exit statuses, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared = {**os.environ, **shared, **environment}
    processes = [
        subprocess.Popen([sys.executable, *program], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    return [process.wait() for process in processes]


def summary(values: Sequence[float], unit: str, of: str = "") -> Row:
    """Median and minimum: ``summary(seconds, "s", "wall")`` has ``wall_median_s`` and ``wall_min_s``."""
    start = f"{of}_" if of else ""
    return {f"{start}median_{unit}": statistics.median(values), f"{start}min_{unit}": min(values)}


def ratio(value: float | None, of: float | None) -> float | None:
    """``value`` as a multiple of ``of``; None if there is no such number."""
    return value / of if value is not None and of else None


def write(path: Path | None, benchmark: str, rows: Sequence[Row]) -> None:
    """Write the file whole, or nothing if none was asked for."""
    if path is not None:
        write_whole(path, json.dumps(result(benchmark, rows), indent=2, allow_nan=False) + "\n")


def result(benchmark: str, rows: Sequence[Row]) -> Row:
    """The whole object; numbers that are none, such as NaN, become null."""
    return {
        "benchmark": benchmark,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "units": _units_of(rows),
        "rows": _finite(rows),
    }


def _units_of(rows: Sequence[Row]) -> dict[str, str]:
    """The units that occur, by the ends of names."""
    ends = {next((end for end in UNITS if name.endswith(end)), "") for row in rows for name in row}
    return {end: meaning for end, meaning in UNITS.items() if end in ends}


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
