"""What the nsys of this node can do, found out by a capture of one range: its flags, and whether ranges are recorded.

Some pairs of nsys and the Python package ``nvtx`` record nothing, without a word. A training run under such a pair
would be hours of empty reports, so each node tries it once, and notes the answer in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import write_whole
from hpcmm.node.cache import one_at_a_time
from hpcmm.nsys.capture import start_under_nsys
from hpcmm.nsys.importer import import_qdstrm

_TIMEOUT_S = 120
_RANGE = "hpcmm probe"
_RECORD_ONE_RANGE = f"import nvtx\nwith nvtx.annotate({_RANGE!r}, domain='hpcmm'): pass"
_FOUND = "SELECT count(*) FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId WHERE coalesce(text, value) = ?"


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


def _probe(nsys: str) -> NsysFacts:
    try:
        said_version = _output(nsys, "--version")
        flags = sorted(set(re.findall(r"--([a-z][a-z0-9-]+)", _output(nsys, "profile", "--help"))))
        problem = _problem_of_a_capture(nsys)
    except (OSError, subprocess.SubprocessError, sqlite3.Error, HpcmmError) as error:
        return NsysFacts("", (), f"a capture of one range failed ({error})")
    return NsysFacts(said_version.strip().splitlines()[-1], tuple(flags), problem)


def _problem_of_a_capture(nsys: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="hpcmm-nsys-probe-") as folder:
        raw, report, table = (Path(folder) / f"probe.{kind}" for kind in ("qdstrm", "nsys-rep", "sqlite"))
        flags = ("--trace=nvtx", "--sample=none", "--cpuctxsw=none", f"--output={raw.with_suffix('')}")
        command = (sys.executable, "-c", _RECORD_ONE_RANGE)
        start_under_nsys([nsys, "profile", "--show-output=false", *flags], command, Path(folder) / "started")
        if not report.exists():
            import_qdstrm(raw, report)
        _output(nsys, "export", "--type=sqlite", f"--output={table}", str(report))
        with closing(sqlite3.connect(table)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            recorded = "NVTX_EVENTS" in tables and database.execute(_FOUND, (_RANGE,)).fetchone()[0] > 0
    if recorded:
        return None
    return (
        f"it records no NVTX ranges of the Python package nvtx {version('nvtx')}: install another one of the two "
        "(nvtx 0.2.11 works with nsys up to 2023.4)"
    )


def _output(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-200:]
        raise HpcmmError(f"{Path(command[0]).name} {command[1]}: exit status {done.returncode}, {said!r}")
    return done.stdout


def _installation(nsys: Path) -> str:
    """Changes with the nsys, the nvtx and the Python that are tried."""
    binary = nsys.resolve()
    facts = (str(binary), binary.stat().st_size, binary.stat().st_mtime_ns, version("nvtx"), sys.prefix)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _read(record: Path) -> NsysFacts | None:
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return NsysFacts(str(values["version"]), tuple(map(str, values["flags"])), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None
