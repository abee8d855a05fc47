"""A sweep as a table: of each point how it ended, the time of its steps, what its ranks exchange, and their memory."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcmm.jobs.find_run import Target
from hpcmm.jobs.state import State
from hpcmm.ranges import is_task_of
from hpcmm.runs.exit_status import COMPLETED, FAILED
from hpcmm.runs.ledger import overrides_of, refused_of
from hpcmm.runs.run_dir import SweepDir
from hpcmm.runs.throughput import Throughput, throughput_of
from hpcmm.text import printable

REFUSED = "REFUSED"
"""The state of a point that could not be launched."""
_HAS_A_CAUSE = {FAILED, "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"}
"""States that ``jobs why`` explains."""
_MB = 1e6
_WORDS = 3
"""The first columns: point, overrides, state."""


@dataclass(frozen=True)
class Row:
    """A point of a sweep, or a run by itself."""

    point: str
    """``0003``; of a run by itself its name; empty for a point that was refused."""
    overrides: str
    state: str
    """As Slurm has it, or ``REFUSED``; in lower case what hpcmm says in its place."""
    reason: str
    """Why it was refused."""
    pace: Throughput | None
    """None if no step is noted."""


def rows_of(state: State) -> list[Row]:
    """Of a sweep a row for each point, those that were refused last; of a run one."""
    target = state.target
    if target.sweep is None:
        name = target.asked if target.run is None else target.run.root.name
        word = state.newest.state if state.jobs else "unknown"
        return [Row(name, "", word, "", None if target.run is None else throughput_of(target.run))]
    overrides = overrides_of(target.sweep)
    rows = [_row(state, point, overrides) for point in target.points]
    return rows + [Row("", given, REFUSED, reason, None) for given, reason in refused_of(target.sweep)]


def jobs_by_state(state: State) -> Counter[str]:
    """How many jobs, or points of a sweep, are in which of Slurm's states."""
    counts = Counter[str]()
    for job in state.jobs:
        counts[job.state] += job.tasks
    return counts


def _row(state: State, point: Target, overrides: dict[int, str]) -> Row:
    assert point.run is not None  # a point of a sweep has its folder
    place = SweepDir.of_point(point.run)
    newest = point.job_ids[-1:]
    words = [job.state for task in newest for job in state.jobs if is_task_of(task, job.job_id)]
    word = words[0] if words else "unknown" if newest else "never submitted"
    given = "" if place is None else overrides.get(place[1], "")
    return Row(point.run.root.name, given, word, "", throughput_of(point.run))


def values_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON, with the units in the names: seconds, bytes."""
    return [
        {"point": row.point, "overrides": row.overrides, "state": row.state, "reason": row.reason}
        | (_numbers(row.pace) if row.pace is not None else {})
        for row in rows
    ]


def _numbers(pace: Throughput) -> dict[str, Any]:
    names = ("steps", "step_s", "tokens_per_s", "samples_per_s", "comm_bytes", "peak_memory_bytes")
    loss = pace.loss if pace.loss is not None and abs(pace.loss) < float("inf") else None  # JSON has no other
    return {name: value for name, value in asdict(pace).items() if name in names} | {"loss": loss}


def lines_of(rows: Sequence[Row], asked: str) -> list[str]:
    """The table as text: columns that no row has a value for are left out. ``asked``: what the user named."""
    axes = sorted({axis for row in rows if row.pace is not None for axis in row.pace.comm_bytes})
    header = ["point", "overrides", "state", "step s", "tokens/s", "samples/s"]
    header += [f"{axis.replace('_', ' ')} MB" for axis in axes] + ["peak MB", "loss"]
    table = [header, *(_cells(row, axes) for row in rows)]
    kept = [*range(_WORDS), *(at for at in range(_WORDS, len(header)) if any(cells[at] for cells in table[1:]))]
    widths = {column: max(len(cells[column]) for cells in table) for column in kept}
    lines = [_line([cells[column] for column in kept], [widths[column] for column in kept]) for cells in table]
    lines = [f"{line}  {_reason(row)}".rstrip() for line, row in zip(lines, [None, *rows], strict=True)]
    if axes:
        lines.append(
            "MB: payload that a rank exchanges in a step, the mean over its ranks, by what the groups are for."
        )
    if any(row.state in _HAS_A_CAUSE for row in rows):
        lines.append(f"why one failed: python -m hpcmm.jobs why {printable(shlex.quote(asked))}")
    return lines


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    padded = (
        cell.rjust(width) if place >= _WORDS else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def _reason(row: Row | None) -> str:
    """Why the point was refused, in one line."""
    return "" if row is None else printable(" ".join(row.reason.split()))


def _cells(row: Row, axes: Sequence[str]) -> list[str]:
    pace = row.pace
    numbers = [""] * (len(axes) + 5)
    if pace is not None:
        exchanged = (
            [_short(pace.comm_bytes.get(axis, 0.0) / _MB) for axis in axes] if pace.comm_bytes else [""] * len(axes)
        )
        numbers = [
            _short(pace.step_s),
            f"{pace.tokens_per_s:,.0f}" if pace.tokens_per_s else "",
            _short(pace.samples_per_s),
            *exchanged,
            f"{pace.peak_memory_bytes / _MB:,.0f}",
            "" if pace.loss is None else f"{pace.loss:.4f}",
        ]
    return [printable(cell) for cell in (row.point, row.overrides, row.state, *numbers)]


def _short(value: float) -> str:
    """Three digits that count; empty for 0, which is not known or nothing."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def has_completed(rows: Sequence[Row]) -> bool:
    """Whether each point that was launched has completed."""
    return all(row.state in (COMPLETED, REFUSED) for row in rows)
