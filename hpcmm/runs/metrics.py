"""What ranks note while they train: one JSON object a line, each line whole as soon as it is written; and the scores.

Files of another user are read with care: long lines, odd types and pipes in the place of files do no harm.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.files import json_object, names_in, open_regular, read_json_object, read_tail, write_json
from hpcmm.runs.ownership import is_mine
from hpcmm.runs.run_dir import RunDir

MAX_LINE_BYTES = 1 << 20
"""Of a line of metrics; what is longer is damage."""
TAIL_BYTES = 64 * 1024
_MOST_BYTES = 1 << 30
"""Of a rank's records that are read."""
_MOST_RANKS_OF_OTHERS = 10_000
_MOST_BYTES_OF_OTHERS = 1 << 31
"""Of all ranks' records that are looked through; a line counts for more than its length."""
_MOST_PARSED_OF_OTHERS = 32 * 1024**2
"""Of these, what is understood: the starts, and what stands before a first step."""
MOST_TAILS_OF_OTHERS = 32 * 1024**2
BYTES_OF_A_LINE = 128
"""As long as a record; so much also an empty line costs."""
COMM_BYTES = "comm_bytes_"
"""How the names of a step's values begin that tell what the rank exchanged, by what its groups are for."""
_RANK_FILE = re.compile(r"rank_([0-9]{1,9})\.jsonl")
_STEPPED = ("step", "lost")
"""Events of a rank that came as far as a step."""
_STEP = b'{"event": "step"'
_LOST_STEP = b'{"event": "lost"'
"""As long as ``_STEP``, so that it can be written over it under the eyes of who follows the file."""


class MetricsWriter:
    """Appends records; a job that is requeued goes on in the same file, under the next attempt's number."""

    def __init__(self, path: Path, attempt: int = 1) -> None:
        """Raises HpcmmError if the file cannot be written, as every method here that writes."""
        self._path = path
        self._attempt = attempt
        with self._clear_errors():
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._end = _end_of_the_last_whole_line(self._fd)
            os.ftruncate(self._fd, self._end)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def start(self, *, rank: int, local_rank: int, world_size: int, node: str, job_id: str) -> None:
        """Who writes here: what the analysis falls back on where a report does not tell."""
        self._write(
            "start",
            rank=rank,
            local_rank=local_rank,
            node=node,
            world_size=world_size,
            job_id=job_id,
            pid=os.getpid(),
            cpus=os.cpu_count(),
        )

    @contextmanager
    def startup(self, part: str) -> Iterator[None]:
        """Record how long a part of the start took, as ``duration_s``."""
        began = time.perf_counter()
        yield
        self.startup_part(part, time.perf_counter() - began)

    def startup_part(self, part: str, duration_s: float) -> None:
        """A part of the start that was measured otherwise."""
        self._write("startup", part=part, duration_s=duration_s)

    def device(self, *, name: str, precision: str, peak_flops: float | None) -> None:
        """What the rank computes on: ``peak_flops`` a second with inputs of that precision; None if not known."""
        self._write("device", name=name, precision=precision, peak_flops=peak_flops)

    def groups(self, mesh: str, marks: Sequence[str]) -> None:
        """How the ranks are laid out, and what this rank's process groups are for, as its report has it too."""
        self._write("groups", mesh=mesh, marks=list(marks))

    def resume(self, step: int) -> None:
        """Training goes on with ``step``. Later steps of earlier attempts become ``lost`` records: they come again."""
        with self._clear_errors():
            offset = 0
            for line in os.pread(self._fd, self._end, 0).splitlines(keepends=True):
                if line.startswith(_STEP) and json.loads(line)["step"] >= step:
                    os.pwrite(self._fd, _LOST_STEP, offset)
                offset += len(line)
        self._write("resume", step=step)

    def step(self, step: int, **values: float) -> None:
        """One training step. ``values`` in the units of their names (``step_s``)."""
        self._write("step", step=step, **values)

    def evaluated(self, steps_done: int, **scores: float) -> None:
        """Scores on held-out data while training, after ``steps_done`` steps."""
        self._write("evaluate", steps_done=steps_done, **scores)

    def settled(self, steps_done: int, reason: str) -> None:
        """Training ends before its last step, for its metric has settled."""
        self._write("settled", steps_done=steps_done, reason=reason)

    def end(self, **values: float) -> None:
        self._write("end", **values)

    def _write(self, event: str, **values: object) -> None:
        record = {"event": event, **values, "attempt": self._attempt, "unix_ns": time.time_ns()}
        line = (json.dumps(record) + "\n").encode()
        with self._clear_errors():
            written = 0
            try:
                while written < len(line):
                    written += os.pwrite(self._fd, line[written:], self._end + written)
            except OSError:
                os.ftruncate(self._fd, self._end)  # half a line is none
                raise
            self._end += len(line)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HpcmmError(
                f"{self._path} cannot be written ({error.strerror}): what is there is whole. Make room there, then "
                f"submit the run's submission.sh again; it goes on from the last checkpoint."
            ) from error


def _end_of_the_last_whole_line(fd: int) -> int:
    """In bytes. A rank that was killed may have left half a line after it."""
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0).rfind(b"\n") + 1


@dataclass(frozen=True)
class RankStart:
    """A rank's own ``start`` record."""

    rank: int
    node: str
    job_id: str
    pid: int
    cpus: int = 0
    """Of the node, as the kernel counts them; 0 if that is not known."""


@dataclass(frozen=True)
class RankStarts:
    """The starts of a rank, of which a requeued job has several in one file."""

    last: RankStart
    records: tuple[dict[str, Any], ...]
    """Of all starts: each part, and the first step of each attempt."""

    @property
    def stepped(self) -> bool:
        """It came as far as a step."""
        return any(record.get("event") in _STEPPED for record in self.records)


@dataclass(frozen=True)
class RankProgress:
    """How far a rank came since its newest start."""

    rank: int
    node: str
    job_id: str
    """Slurm's own number, which each task of an array has."""
    last_step: int | None
    """Number of its last finished step; None before the first."""
    last_unix_ns: int
    """The node's clock at its last record."""
    ended: bool
    """It trained to its end."""


@dataclass(frozen=True)
class FinishedStep:
    """A step as its rank noted it."""

    steps_done: int
    loss: float
    step_s: float


def starts_of(run: RunDir) -> list[RankStarts]:
    """The starts of each rank that says which one it is, by the names of the files in ``RUN/metrics``.

    None at all of another user's run whose files hold more than those of any run.
    """
    allowance = None if is_mine(run.root) else _Allowance()
    try:
        return [found for path in rank_files(run).values() if (found := _starts(run, path, allowance)) is not None]
    except _BeyondAllowanceError:
        return []


def progress_of(run: RunDir) -> dict[int, RankProgress]:
    """How far each rank came, by its number; from the ends of the files, however long these are."""
    files = rank_files(run)
    share = TAIL_BYTES if is_mine(run.root) else min(TAIL_BYTES, MOST_TAILS_OF_OTHERS // max(1, len(files)))
    found = {rank: _progress(run, path, rank, share) for rank, path in files.items()}
    return {rank: progress for rank, progress in found.items() if progress is not None}


def finished_step(line: str) -> FinishedStep | None:
    """The step of a line; None for a line that is no step's, or damaged."""
    record = json_object(line)
    if record is None or record.get("event") != "step":
        return None
    try:
        return FinishedStep(int(record["step"]) + 1, float(record["loss"]), float(record["step_s"]))
    except (ValueError, KeyError, TypeError, OverflowError):  # as a full disk leaves it
        return None


def write_scores(run: RunDir, scores: Mapping[str, float]) -> None:
    """Write ``evaluation.json``: scores on held-out data before and after training."""
    write_json(run.evaluation, dict(scores))


def read_scores(run: RunDir) -> dict[str, float]:
    """What :func:`write_scores` wrote; empty if there is none, without what is no number."""
    found = read_json_object(run.evaluation, within=run.root)
    return {name: value for name, value in found.items() if isinstance(value, float)}


@dataclass(frozen=True)
class Settled:
    """A run that ended before its last step, for its metric had settled."""

    steps_done: int
    reason: str
    """The rest of a sentence: ``loss has not fallen by 0.01 in 20 steps``."""

    def __str__(self) -> str:
        return f"settled after step {self.steps_done}: {self.reason}"


def write_settled(run: RunDir, settled: Settled) -> None:
    """Write ``settled.json``, once the checkpoint after these steps is whole: the run is finished from then on."""
    write_json(run.settled, {"steps_done": settled.steps_done, "reason": settled.reason})


def read_settled(run: RunDir) -> Settled | None:
    """What :func:`write_settled` wrote; None if the run has not settled."""
    found = read_json_object(run.settled, within=run.root)
    steps_done, reason = found.get("steps_done"), found.get("reason")
    if isinstance(steps_done, int) and not isinstance(steps_done, bool) and isinstance(reason, str):
        return Settled(steps_done, reason)
    return None


def rank_files(run: RunDir) -> dict[int, Path]:
    """The ranks' records by their number; none at all if they are more than any run has."""
    names = names_in(run.metrics, within=run.root)
    if len(names) > _MOST_RANKS_OF_OTHERS and not is_mine(run.root):
        return {}  # a part of them would tell another story than all
    found = {name: _RANK_FILE.fullmatch(name) for name in sorted(names)}
    return {int(match[1]): run.metrics / name for name, match in found.items() if match}


class _BeyondAllowanceError(Exception):
    """A part of the records would tell another story than all."""


@dataclass
class _Allowance:
    """What may still be read of another user's run, so that nobody can make a reader work without end."""

    to_look_through: int = _MOST_BYTES_OF_OTHERS
    to_parse: int = _MOST_PARSED_OF_OTHERS

    def take(self, line: bytes, *, parsed: bool) -> None:
        cost = len(line) + BYTES_OF_A_LINE
        self.to_look_through -= cost
        self.to_parse -= cost if parsed else 0
        if min(self.to_look_through, self.to_parse) < 0:
            raise _BeyondAllowanceError


def _starts(run: RunDir, path: Path, allowance: _Allowance | None) -> RankStarts | None:
    """None if no record says which rank wrote the file."""
    start: RankStart | None = None
    records: list[dict[str, Any]] = []
    before_first_step = True
    try:
        with open_regular(path, within=run.root) as file:
            most = min(os.fstat(file.fileno()).st_size, _MOST_BYTES)  # it may grow for ever while it is read
            for line in iter(partial(file.readline, MAX_LINE_BYTES), b""):
                most -= len(line)
                if most < 0:
                    break
                tells = line.startswith(b"{") and (before_first_step or b'"start' in line)
                if allowance is not None:
                    allowance.take(line, parsed=tells)
                if tells and (record := json_object(line.decode(errors="replace"))):
                    start = _as_start(record) or start
                    before_first_step = record.get("event") not in _STEPPED
                    if record.get("event") != "start":
                        records.append(record)
    except OSError:
        return None
    return RankStarts(start, tuple(records)) if start is not None else None


def _as_start(record: dict[str, Any]) -> RankStart | None:
    if record.get("event") != "start":
        return None
    try:
        job_id, cpus = str(record.get("job_id", "")), int(record.get("cpus") or 0)
        return RankStart(int(record["rank"]), str(record["node"]), job_id, int(record["pid"]), cpus)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _progress(run: RunDir, path: Path, rank: int, most_bytes: int) -> RankProgress | None:
    most_lines = most_bytes // BYTES_OF_A_LINE
    records = whole_records(read_tail(path, most_bytes, within=run.root).splitlines()[-most_lines:])
    began = [number for number, record in enumerate(records) if record.get("event") == "start"]
    since = records[began[-1] :] if began else records
    start = (
        since[0] if began else _first_start(run, path, most_bytes)
    )  # of a long file the tail may hold no start, but the head does
    if start is None or not since:
        return None
    steps = [record["step"] for record in since if record.get("event") == "step" and _is_count(record.get("step"))]
    last_ns = since[-1].get("unix_ns")
    return RankProgress(
        rank,
        str(start.get("node", "")),
        str(start.get("job_id", "")),
        steps[-1] if steps else None,
        last_ns if isinstance(last_ns, int) and _is_count(last_ns) else 0,
        since[-1].get("event") == "end",
    )


def _first_start(run: RunDir, path: Path, most_bytes: int) -> dict[str, Any] | None:
    return next((record for record in head_records(run, path, most_bytes) if record.get("event") == "start"), None)


def head_records(run: RunDir, path: Path, most_bytes: int) -> list[dict[str, Any]]:
    """The records that a file begins with."""
    try:
        with open_regular(path, within=run.root) as file:
            head = file.read(most_bytes).decode(errors="replace")
    except OSError:
        return []
    return whole_records(head.splitlines()[: most_bytes // BYTES_OF_A_LINE])


def whole_records(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Of whole lines: the tail of a file begins within one, and a rank may have died while it wrote another."""
    return [record for line in lines if (record := json_object(line)) is not None]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
