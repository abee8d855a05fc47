"""Whether an NVTX range of this Python is really recorded by the nsys of this node."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.nsys.capture import START_ATTEMPTS, one_start_at_a_time
from hpcmm.nsys.importer import import_qdstrm

_RANGE = "hpcmm doctor's range"
_PROGRAM = f"import nvtx\nwith nvtx.annotate({_RANGE!r}): pass\n"
_TIMEOUT_S = 120


def nsys_problem(nsys: str) -> str | None:
    """Profile a small program, read its report, look for its range. Returns what is wrong, None when it is there."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-doctor-") as name:
        folder = Path(name)
        output = folder / "report"
        profile = [nsys, "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none", f"--output={output}"]
        report, raw = output.with_suffix(".nsys-rep"), output.with_suffix(".qdstrm")
        for _ in range(START_ATTEMPTS):
            with one_start_at_a_time():
                said = _run([*profile, sys.executable, "-c", _PROGRAM], folder)
            if report.exists() or raw.exists():
                break
        if not report.exists():
            if not raw.exists():
                return f"nsys left no report ({said or 'it said nothing'})"
            try:
                import_qdstrm(raw, report)
            except HpcmmError as error:
                return str(error)
        exported = folder / "report.sqlite"
        said = _run([nsys, "export", "--type=sqlite", f"--output={exported}", str(report)], folder)
        if not exported.exists():
            return f"nsys exports no SQLite ({said or 'it said nothing'})"
        return (
            None if _holds_range(exported) else "nsys recorded no NVTX range: with nsys before 2023.4 use nvtx 0.2.11"
        )


def _run(command: list[str], folder: Path) -> str:
    """The end of what the command said. What counts is whether its file is there, not its status."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join((done.stdout + done.stderr).split())[-200:]


def _holds_range(exported: Path) -> bool:
    with sqlite3.connect(f"file:{exported}?mode=ro", uri=True) as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "NVTX_EVENTS" not in tables:
            return False
        texts = {row[0] for row in database.execute("SELECT text FROM NVTX_EVENTS WHERE text IS NOT NULL")}
        columns = {row[1] for row in database.execute("PRAGMA table_info(NVTX_EVENTS)")}
        if "textId" in columns and "StringIds" in tables:
            query = "SELECT value FROM NVTX_EVENTS JOIN StringIds ON textId = StringIds.id"
            texts |= {row[0] for row in database.execute(query)}
    return _RANGE in texts
