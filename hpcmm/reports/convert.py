"""From a report as nsys leaves it (``.nsys-rep``, ``.qdstrm``) to an SQLite export in a private cache.

Inputs are never written to, nor anything beside them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hpcmm.errors import HpcmmError
from hpcmm.files import resolved
from hpcmm.nsys.importer import import_qdstrm
from hpcmm.reports.find import ReportSource
from hpcmm.resources import FOLDER_OF_NSYS
from hpcmm.runs.ownership import Reach, exchangeable, require_mine
from hpcmm.runs.run_dir import make_private

EXPORT_TIMEOUT_S = 3600
_PIECE_BYTES = 1 << 24


class NewerReportError(HpcmmError):
    """A newer nsys recorded the report than there is here; nothing is wrong with it."""


@dataclass(frozen=True, slots=True)
class Converter:
    """Turns captures into SQLite files under ``cache`` (created with mode 0700: exports hold environments)."""

    cache: Path
    nsys: Path | None
    owner: int = field(default_factory=os.getpid)
    """Whose unfinished exports :meth:`clear` removes."""

    @classmethod
    def locate(cls, cache: Path) -> Converter:
        """A converter with the nsys on the PATH; it may be missing, which matters only where it is needed."""
        found = shutil.which("nsys")
        nsys = Path(found).resolve() if found else None
        return cls(cache.absolute(), nsys)

    def to_sqlite(self, source: ReportSource) -> Path:
        """An SQLite file of ``source``: the given one, or a cached export.

        Raises HpcmmError with the reason of each candidate when none can be converted; NewerReportError if a newer nsys
        than there is here can.
        """
        reasons = []
        is_newer = False
        for candidate in source.candidates:
            try:
                return self._convert(candidate)
            except HpcmmError as error:
                reasons.append(str(error))
                is_newer |= isinstance(error, NewerReportError)
            except OSError as error:
                reasons.append(f"{candidate} could not be read: {error.strerror}.")
        told = "; ".join(reason.removesuffix(".") for reason in reasons) + "."
        raise NewerReportError(told) if is_newer else HpcmmError(told)

    def _convert(self, path: Path) -> Path:
        # A pipe would be waited for. What is open here is what is read, whatever lies at ``path`` by then.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise HpcmmError(f"{path} is not a file, although it has the name of a report.")
            if status.st_size == 0:
                raise HpcmmError(f"{path} has no bytes: the capture was cut off before anything was written.")
            if path.suffix == ".sqlite" and not _is_exchangeable(path, status):
                return path
            self._prepare_cache()
            target = self._target(path, status)
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=self.cache, prefix=f"export-{self.owner}-") as scratch:
                    self._export(path, file, Path(scratch), target)
        return target

    def discard(self, source: ReportSource) -> None:
        """Remove what was exported of ``source``; never the user's own files."""
        for candidate in source.candidates:
            with suppress(OSError):  # the report is gone
                self._target(candidate, candidate.stat()).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what workers that died have left, and the cache if nothing is in it any more."""
        for left in self.cache.glob(f"export-{self.owner}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if self.cache.is_dir() and not any(self.cache.iterdir()):
            self.cache.rmdir()

    def _target(self, path: Path, status: os.stat_result) -> Path:
        text = f"{resolved(path)}\0{status.st_size}\0{status.st_mtime_ns}"
        key = hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
        return self.cache / f"{path.stem}-{key}.sqlite"

    def _prepare_cache(self) -> None:
        with suppress(FileExistsError):  # of an earlier analysis, or of another worker of this one
            make_private(self.cache)
        require_mine(self.cache, "name a folder of your own with --out, for exports hold the ranks' environment")
        self.cache.chmod(0o700)

    def _export(self, path: Path, file: IO[bytes], scratch: Path, target: Path) -> None:
        """``path`` is the report by its name, ``file`` what is open of it."""
        partial = scratch / "report.sqlite"
        if path.suffix == ".sqlite":
            _copy(file, partial)
        else:
            report = scratch / "report.nsys-rep"
            if path.suffix == ".qdstrm":
                _import(path, file, report)
            else:
                report.symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
            self._run_nsys(path, report, partial)
        if not partial.is_file():
            raise HpcmmError(f"{path} could not be exported: the report is truncated or damaged.")
        partial.replace(target)

    def _run_nsys(self, subject: Path, report: Path, export: Path) -> None:
        if self.nsys is None:
            raise HpcmmError(
                f"{subject} needs nsys to be read: put nsys on the PATH, or export it to .sqlite elsewhere."
            )
        made, given = str(export.absolute()), str(report.absolute())
        _run([str(self.nsys.absolute()), "export", "--type", "sqlite", "-o", made, given], export.parent, subject)


def _is_exchangeable(path: Path, status: os.stat_result) -> bool:
    """Whether anybody could put a pipe in the place of this file before SQLite opens it, which takes a name alone."""
    found = exchangeable(path)
    return status.st_uid not in {0, os.geteuid()} or (found is not None and found.reach >= Reach.everybody)


def _import(qdstrm: Path, file: IO[bytes], report: Path) -> None:
    """Make ``report`` of a raw capture, which nsys leaves where it was killed or finds no importer."""
    copy = report.with_name("capture.qdstrm")
    _copy(file, copy)
    import_qdstrm(copy, report, subject=qdstrm)
    copy.unlink()


def _copy(file: IO[bytes], target: Path) -> None:
    """Copy what data a file has: another user's may be said to be of any size."""
    size = os.fstat(file.fileno()).st_size
    with target.open("xb") as copied:
        at = 0
        while at < size:
            try:
                at = file.seek(at, os.SEEK_DATA)
                end = file.seek(at, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # there is none behind this
                    break
                if error.errno != errno.EINVAL:
                    raise
                end = size  # the file system does not tell where data is
            file.seek(at)
            copied.seek(at)
            while at < end and (piece := file.read(min(_PIECE_BYTES, end - at))):
                at += copied.write(piece)
            at = end
        copied.truncate(size)


def _run(command: list[str], scratch: Path, subject: Path) -> None:
    """Run one of nsys's tools; its own complaint becomes the reason."""
    try:
        done = subprocess.run(
            command,
            cwd=FOLDER_OF_NSYS,
            env=os.environ | {"TMPDIR": str(scratch.absolute())},
            umask=0o077,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=EXPORT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HpcmmError(f"{subject}: {command[0]} failed: {error}.") from error
    if done.returncode != 0:
        told = _complaint(done.stdout + done.stderr)
        if newer := _of_a_newer_nsys(subject, told):
            raise NewerReportError(newer)
        raise HpcmmError(f"{subject} could not be converted: {told.splitlines()[-1]}")


_NEWER = re.compile(r"version \((?P<made>[\w.-]+)\)[^()]*newer[^()]*version \((?P<here>[\w.-]+)\)")
_NOT_SUPPORTED = "Version not supported"
"""What nsys 2022.4 says of a report whose format it does not know."""


def _of_a_newer_nsys(subject: Path, complaint: str) -> str:
    """What to do with a report that a newer nsys recorded than there is here; empty if that is not the complaint."""
    versions = _NEWER.search(complaint)
    if versions is None and _NOT_SUPPORTED not in complaint:
        return ""
    both = (
        f"by nsys {versions['made']}, and nsys here is {versions['here']}" if versions else "by a newer nsys than here"
    )
    given, export = (shlex.quote(name) for name in (subject.name, f"{subject.stem}.sqlite"))
    return (
        f"{subject} was recorded {both}: run nsys export --type sqlite -o {export} {given} where it was recorded, and "
        f"put {export} beside it."
    )


def _complaint(output: str) -> str:
    """The lines that say something, without progress bars; at least one."""
    lines = [line.split("\r")[-1].strip()[:300] for line in output.splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Processing [", "Exporting "))]
    return "\n".join(telling[-_MOST_LINES:]) or "the file is truncated or damaged."


_MOST_LINES = 20
