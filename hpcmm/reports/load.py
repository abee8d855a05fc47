"""Convert, read and reduce many captures, each in a worker process; a capture that cannot be read becomes a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from hpcmm.errors import HpcmmError
from hpcmm.reports.convert import Converter
from hpcmm.reports.events import read_report
from hpcmm.reports.find import ReportSource
from hpcmm.reports.report import Parts, Progress, Report
from hpcmm.reports.worker_pool import WorkerDiedError, map_in_workers, worker_count
from hpcmm.text import printable

_DAMAGE = (ValueError, TypeError, ArithmeticError, LookupError)
"""What values that no nsys would write can raise in the reader, UnicodeDecodeError and OverflowError among them."""

SMALL_BYTES = 16 << 20
"""Exports of this size in all are read in less time than it takes to start a worker."""

Reduced = TypeVar("Reduced")


@dataclass(frozen=True, slots=True)
class Reading(Generic[Reduced]):
    """A capture and what came of it: what its report was reduced to, or the reason why there is none."""

    source: ReportSource
    value: Reduced | None
    reason: str = ""


def read_all(
    sources: Sequence[ReportSource],
    converter: Converter,
    reduce: Callable[[Report], Reduced],
    progress: Progress,
    *,
    keep_cache: bool,
    parts: Parts = Parts.ALL,
) -> Iterator[Reading[Reduced]]:
    """Readings in the order of ``sources``. Only what ``reduce``, a module's function, makes of the ``parts`` of a
    report is kept.

    Exports hold the processes' whole environments; they are deleted once read unless ``keep_cache``.
    """
    read = partial(read_report, parts=parts)
    work = partial(_read, converter=converter, read=read, reduce=reduce, keep_cache=keep_cache)
    largest = max((source.size_bytes for source in sources), default=0)
    workers = worker_count(len(sources), largest)
    results = map(work, sources) if _small(sources) else map_in_workers(work, sources, workers)
    try:
        for done, (source, result) in enumerate(zip(sources, results, strict=True)):
            progress(f"reading {printable(source.name)}", done, len(sources))
            if isinstance(result, WorkerDiedError):
                if not keep_cache:
                    converter.discard(source)
                yield Reading(source, None, f"{source.path} could not be read: of the process that read it, {result}.")
            else:
                yield result
    finally:
        if not keep_cache:
            converter.clear()
    progress("reading reports", len(sources), len(sources))


def _small(sources: Sequence[ReportSource]) -> bool:
    """Whether to read in this process: one report has no other to save from it, and small exports take no time."""
    exports = all(source.path.suffix == ".sqlite" for source in sources)
    return len(sources) < 2 or (exports and sum(source.size_bytes for source in sources) < SMALL_BYTES)


def _read(
    source: ReportSource,
    *,
    converter: Converter,
    read: Callable[[Path, Path], Report],
    reduce: Callable[[Report], Reduced],
    keep_cache: bool,
) -> Reading[Reduced]:
    """One capture from its file to what is kept of it."""
    try:
        return Reading(source, reduce(read(converter.to_sqlite(source), source.path)))
    except HpcmmError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{source.path} could not be read: {error.strerror}."
    except MemoryError:
        reason = f"{source.path} could not be read: it needs more memory than there is."
    except _DAMAGE as error:
        reason = f"{source.path} is damaged: {type(error).__name__}: {error}."
    finally:
        if not keep_cache:
            converter.discard(source)
    return Reading(source, None, reason)
