"""Convert and read many captures, the conversions in parallel; a capture that cannot be read becomes a reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hpcmm.errors import HpcmmError
from hpcmm.reports.convert import Converter
from hpcmm.reports.events import Report, read_report
from hpcmm.reports.find import ReportSource

_DAMAGE = (ValueError, TypeError, ArithmeticError, LookupError)
"""What values that no nsys would write can raise in the reader, UnicodeDecodeError and OverflowError among them."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A capture and what came of it: a report, or the reason why there is none."""

    source: ReportSource
    report: Report | None
    reason: str = ""


def read_all(
    sources: Sequence[ReportSource], converter: Converter, progress: Progress, *, keep_cache: bool
) -> Iterator[Reading]:
    """Readings in the order of ``sources``, one at a time so that only one report's events are in memory.

    Exports hold the processes' whole environments; they are deleted once read unless ``keep_cache``.
    """
    workers = min(len(sources), os.cpu_count() or 1) or 1
    with ThreadPoolExecutor(workers) as pool:
        conversions = [pool.submit(converter.to_sqlite, source) for source in sources]
        for done, (source, conversion) in enumerate(zip(sources, conversions, strict=True)):
            progress(f"reading {source.name}", done, len(sources))
            try:
                export = conversion.result()
            except HpcmmError as error:
                yield Reading(source, None, str(error))
                continue
            try:
                yield Reading(source, read_report(export, source.path))
            except HpcmmError as error:
                yield Reading(source, None, str(error))
            except _DAMAGE as error:
                yield Reading(source, None, f"{source.path} is damaged: {type(error).__name__}: {error}.")
            finally:
                if not keep_cache and export.parent == converter.cache:
                    export.unlink(missing_ok=True)
    if not keep_cache and converter.cache.is_dir() and not any(converter.cache.iterdir()):
        converter.cache.rmdir()
    progress("reading reports", len(sources), len(sources))
