"""What the nsys of this node can do, found out by a capture of one range: its flags, and whether ranges are recorded.

Some pairs of nsys and the Python package ``nvtx`` record nothing, without a word. A training run under such a pair
would be hours of empty reports, so each node tries it once, and notes the answer in the cache folder. The
doctor tries it each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import read_text, write_whole
from hpcmm.node.cache import one_at_a_time, private_folder
from hpcmm.nsys.capture import START_ATTEMPTS, one_start_at_a_time
from hpcmm.nsys.importer import import_qdstrm
from hpcmm.resources import FOLDER_OF_NSYS, SAFE_PATH

_TIMEOUT_S = 120
_MOST_WORDS = 200
"""Characters that are kept of what nsys said, from its end."""
_RANGE = "hpcmm probe"
_RECORD_ONE_RANGE = f"import nvtx\nwith nvtx.annotate({_RANGE!r}, domain='hpcmm'): pass"


@dataclass(frozen=True)
class NsysFacts:
    """The answers of one node."""

    version: str
    flags: tuple[str, ...]
    """Long names of the options of ``nsys profile``."""
    problem: str | None
    """Why a capture here holds no ranges; None when it does."""


def nsys_facts(nsys: str, cache: Path) -> NsysFacts:
    """The facts of the nsys at ``nsys`` on this node, from the cache folder where they are known."""
    record = cache / f"{os.uname().nodename}-{_installation(Path(nsys))}.json"
    with one_at_a_time(record.with_suffix(".lock")):
        known = _read(record)
        if known is not None:
            return known
        facts = _probe(nsys)
        if facts.problem is None:  # what is wrong may be mended before the next run
            write_whole(record, json.dumps(asdict(facts)))
        return facts


def nsys_problem(nsys: str) -> str | None:
    """Record a program of one range, read its report, look for the range. Returns what is wrong; None when it is there.

    Nothing is cached. Takes some seconds.
    """
    if find_spec("nvtx") is None:
        return f"its Python, {sys.executable}, has no nvtx, without which no range is recorded"
    try:
        with private_folder("hpcmm-nsys-probe-") as folder:
            return _problem_of_a_capture(nsys, folder)
    except (OSError, subprocess.SubprocessError, sqlite3.Error, HpcmmError) as error:
        return f"a capture of one range failed ({error})"


def _probe(nsys: str) -> NsysFacts:
    try:
        said_version = _output(nsys, "--version")
        flags = sorted(set(re.findall(r"--([a-z][a-z0-9-]+)", _output(nsys, "profile", "--help"))))
    except (OSError, subprocess.SubprocessError, HpcmmError) as error:
        return NsysFacts("", (), f"a capture of one range failed ({error})")
    return NsysFacts(said_version.strip().splitlines()[-1], tuple(flags), nsys_problem(nsys))


def _problem_of_a_capture(nsys: str, folder: Path) -> str | None:
    raw, report, table = (folder / f"probe.{kind}" for kind in ("qdstrm", "nsys-rep", "sqlite"))
    said = _record_one_range(nsys, raw, report)
    if not report.exists():
        if not raw.exists():
            return f"nsys left no report ({said or 'it said nothing'})"
        import_qdstrm(raw, report)
    said = _words(_run(nsys, "export", "--type=sqlite", f"--output={table}", str(report), folder=folder))
    if not table.exists():
        return f"nsys exports no SQLite ({said or 'it said nothing'})"
    if _holds_range(table):
        return None
    return (
        f"it records nothing of nvtx {version('nvtx')}; nsys before 2023.4 needs nvtx 0.2.11: "
        f"{shlex.quote(sys.executable)} -m pip install nvtx==0.2.11"
    )


def _record_one_range(nsys: str, raw: Path, report: Path) -> str:
    """Returns the end of what nsys said. What counts is whether its file is there, not its exit status."""
    flags = ("--trace=nvtx", "--sample=none", "--cpuctxsw=none", f"--output={raw.with_suffix('')}")
    said = ""
    for _ in range(START_ATTEMPTS):
        with one_start_at_a_time():
            program = (sys.executable, *SAFE_PATH, "-c", _RECORD_ONE_RANGE)
            said = _words(_run(nsys, "profile", *flags, *program, folder=raw.parent))
        if report.exists() or raw.exists():
            break
    return said


def _holds_range(table: Path) -> bool:
    """Texts of ranges stand in the table itself, or as numbers of shared strings."""
    with closing(sqlite3.connect(f"file:{table}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "NVTX_EVENTS" not in tables:
            return False
        texts = {text for (text,) in database.execute("SELECT text FROM NVTX_EVENTS WHERE text IS NOT NULL")}
        columns = {row[1] for row in database.execute("PRAGMA table_info(NVTX_EVENTS)")}
        if "textId" in columns and "StringIds" in tables:
            query = "SELECT value FROM NVTX_EVENTS JOIN StringIds ON textId = StringIds.id"
            texts |= {text for (text,) in database.execute(query)}
    return _RANGE in texts


def _run(*command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``folder``: of this user alone, for what nsys writes meanwhile."""
    return subprocess.run(
        [os.path.abspath(command[0]), *command[1:]],  # noqa: PTH100 -- a word
        cwd=FOLDER_OF_NSYS,
        env=None if folder is None else os.environ | {"TMPDIR": str(folder)},
        umask=0o077,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=_TIMEOUT_S,
    )


def _words(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stdout + done.stderr).split())[-_MOST_WORDS:]


def _output(*command: str) -> str:
    done = _run(*command)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-_MOST_WORDS:]
        raise HpcmmError(f"{Path(command[0]).name} {command[1]}: exit status {done.returncode}, {said!r}")
    return done.stdout


def _installation(nsys: Path) -> str:
    """Changes with the nsys, the nvtx and the Python that are tried."""
    binary = nsys.resolve()
    facts = (str(binary), binary.stat().st_size, binary.stat().st_mtime_ns, version("nvtx"), sys.prefix)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _read(record: Path) -> NsysFacts | None:
    try:
        values = json.loads(read_text(record))
        return NsysFacts(str(values["version"]), tuple(map(str, values["flags"])), None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
