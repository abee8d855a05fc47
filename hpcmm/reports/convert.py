"""From a report as nsys leaves it (``.nsys-rep``, ``.qdstrm``) to an SQLite export in a private cache.

Inputs are never written to, nor anything beside them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.nsys.importer import import_qdstrm
from hpcmm.reports.find import ReportSource
from hpcmm.runs.ownership import require_mine
from hpcmm.runs.run_dir import make_private

EXPORT_TIMEOUT_S = 3600


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

        Raises HpcmmError with the reason of the last candidate when none can be converted.
        """
        reason = f"{source.path}: nothing to read."
        for candidate in source.candidates:
            try:
                return self._convert(candidate)
            except HpcmmError as error:
                reason = str(error)
        raise HpcmmError(reason)

    def _convert(self, path: Path) -> Path:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise HpcmmError(f"{path} is not a file, although it has the name of a report.")
        if status.st_size == 0:
            raise HpcmmError(f"{path} has no bytes: the capture was cut off before anything was written.")
        if path.suffix == ".sqlite":
            return path
        if self.cache.exists():
            require_mine(self.cache, "name a folder of your own with --out, for exports hold the ranks' environment")
        target = self._target(path)
        if not target.exists():
            self._prepare_cache()
            with tempfile.TemporaryDirectory(dir=self.cache, prefix=f"export-{self.owner}-") as scratch:
                report = self._import(path, Path(scratch)) if path.suffix == ".qdstrm" else path
                self._export(report, Path(scratch), target)
        return target

    def discard(self, source: ReportSource) -> None:
        """Remove what was exported of ``source``; never the user's own files."""
        for candidate in source.candidates:
            if candidate.suffix != ".sqlite" and candidate.exists():
                self._target(candidate).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what workers that died have left, and the cache if nothing is in it any more."""
        for left in self.cache.glob(f"export-{self.owner}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if self.cache.is_dir() and not any(self.cache.iterdir()):
            self.cache.rmdir()

    def _target(self, path: Path) -> Path:
        return self.cache / f"{path.stem}-{_cache_key(path)}.sqlite"

    def _prepare_cache(self) -> None:
        try:
            make_private(self.cache)
        except FileExistsError:  # of an earlier analysis, or of another worker of this one
            self.cache.chmod(0o700)

    def _import(self, qdstrm: Path, scratch: Path) -> Path:
        """The ``.nsys-rep`` of a raw capture, which nsys leaves where it was killed or finds no importer."""
        copy, report = scratch / "capture.qdstrm", scratch / "report.nsys-rep"
        shutil.copyfile(qdstrm, copy)
        import_qdstrm(copy, report, subject=qdstrm)
        copy.unlink()
        return report

    def _export(self, report: Path, scratch: Path, target: Path) -> None:
        if self.nsys is None:
            raise HpcmmError(
                f"{report} needs nsys to be read: put nsys on the PATH, or export it to .sqlite elsewhere."
            )
        partial = scratch / "report.sqlite"
        _run([str(self.nsys), "export", "--type", "sqlite", "-o", str(partial), str(report.resolve())], scratch, report)
        if not partial.is_file():
            raise HpcmmError(f"{report} could not be exported: the report is truncated or damaged.")
        partial.replace(target)


def _cache_key(path: Path) -> str:
    status = path.stat()
    text = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(command: list[str], folder: Path, subject: Path) -> None:
    """Run one of nsys's tools; its own complaint becomes the reason."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
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
        raise HpcmmError(f"{subject} could not be converted: {_complaint(done.stdout + done.stderr)}")


def _complaint(output: str) -> str:
    """The last line that says something, without progress bars."""
    lines = [line.split("\r")[-1].strip() for line in output.splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Processing [", "Exporting "))]
    return telling[-1][:300] if telling else "the file is truncated or damaged."
