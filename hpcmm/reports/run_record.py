"""What the run directory itself says about the run: the ranks to expect, and which process was which."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hpcmm.config.untyped_config import read_frozen_config
from hpcmm.errors import HpcmmError
from hpcmm.ranges import profiled_ranks
from hpcmm.runs.run_dir import RunDir

MAX_WORLD_SIZE = 1 << 17
"""More ranks than this are a damaged record."""
MAX_LINE_CHARACTERS = 1 << 20
"""Of a line of metrics; what is longer is damage."""
_STEPPED = ("step", "lost")
"""Events of a rank that came as far as a step."""


@dataclass(frozen=True, slots=True)
class RankStart:
    """A rank's own ``start`` record."""

    rank: int
    node: str
    job_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Empty where the reports came without a run directory."""

    world_size: int = 0
    ranks_per_node: int = 0
    profiled: frozenset[int] = frozenset()
    starts: dict[int, RankStart] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    startup: dict[int, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    """By rank, the records of its start: each part, and the first step of each attempt."""
    folder: str = ""
    """The run directory, as it was given."""
    failed_before_steps: bool = False
    """The directory notes that the job failed, and no step of any rank."""
    nvtx: str = ""
    """Version of the Python package nvtx that the run used; empty where it is not known."""

    @property
    def job_id(self) -> str | None:
        """The job that most ranks name; of a requeued job the start records hold the last one."""
        job_ids = [start.job_id for start in self.starts.values() if start.job_id]
        return max(set(job_ids), key=lambda job: (job_ids.count(job), job)) if job_ids else None

    @property
    def tunable(self) -> dict[str, Any]:
        """The configuration as far as it decides how the ranks run: of the user's script or function, the cluster."""
        task = _section(self.config, "task").get("name", "anomaly")
        cluster = _section(self.config, "cluster")
        return self.config if task == "anomaly" else {"cluster": cluster} if cluster else {}

    def rank_of(self, pid: int, node: str | None) -> int | None:
        """The rank that ran as ``pid``, when only one can be meant."""
        matches = [
            start.rank for start in self.starts.values() if start.pid == pid and (node is None or start.node == node)
        ]
        return matches[0] if len(matches) == 1 else None


def read_run_record(run_dir: RunDir | None) -> RunRecord:
    """The record of ``run_dir``; files that are missing or damaged leave their part empty."""
    if run_dir is None:
        return RunRecord()
    ranks = [found for found in map(_read_metrics, sorted(run_dir.metrics.glob("rank_*.jsonl"))) if found]
    config = read_frozen_config(run_dir.config)
    cluster = _section(config, "cluster")
    nodes, ranks_per_node = _positive(cluster.get("nodes")), _positive(cluster.get("ranks_per_node"))
    world_size = nodes * ranks_per_node
    profile = _section(config, "profile")
    return RunRecord(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        profiled=_profiled(profile, world_size, ranks_per_node),
        starts={start.rank: start for start, _ in ranks},
        config=config,
        name=run_dir.root.resolve().name,
        startup={start.rank: parts for start, parts in ranks},
        folder=str(run_dir.root),
        failed_before_steps=_section(config, "task").get("name", "anomaly") == "anomaly"  # others note no steps
        and _failed(run_dir)
        and not any(part.get("event") in _STEPPED for _, parts in ranks for part in parts),
        nvtx=_nvtx(run_dir),
    )


def _failed(run_dir: RunDir) -> bool:
    """By the last line that the job's script left; where it left none, by what ranks that ended badly left."""
    try:
        if run_dir.exit_status.is_file():
            outcome = run_dir.exit_status.read_text(encoding="utf-8", errors="replace").split()[-1:]
            return outcome != ["0"] and all(each.isdecimal() for each in outcome)
        return next(run_dir.failures.glob("*/rank_*.*.json"), None) is not None
    except OSError:
        return False


def _nvtx(run_dir: RunDir) -> str:
    try:
        packages = _section(_parse(run_dir.provenance.read_text(encoding="utf-8")), "packages")
    except (OSError, ValueError):
        return ""
    return str(packages.get("nvtx") or "")


def _profiled(profile: dict[str, Any], world_size: int, ranks_per_node: int) -> frozenset[int]:
    if profile.get("tool", "nsys") is None or not world_size:
        return frozenset()
    try:
        return profiled_ranks(str(profile.get("ranks", "all")), world_size, ranks_per_node)
    except HpcmmError:  # not a configuration that a launch would have accepted, so it tells nothing
        return frozenset()


def _read_metrics(path: Path) -> tuple[RankStart, tuple[dict[str, Any], ...]] | None:
    """The last ``start`` record of a metrics file, to which a requeued rank appends, and the records of all starts.

    None where no record says which rank wrote the file.
    """
    start: RankStart | None = None
    parts: list[dict[str, Any]] = []
    before_first_step = True
    try:
        if not path.is_file():  # to open a pipe would wait for who writes to it
            return None
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in iter(partial(file.readline, MAX_LINE_CHARACTERS), ""):
                if '"start' in line or before_first_step:
                    record = _parse(line)
                    start = _as_start(record) or start
                    before_first_step = record.get("event") not in _STEPPED
                    if record.get("event") != "start":
                        parts.append(record)
    except OSError:
        return None
    return (start, tuple(parts)) if start is not None else None


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _as_start(record: dict[str, Any]) -> RankStart | None:
    if record.get("event") != "start":
        return None
    try:
        return RankStart(int(record["rank"]), str(record["node"]), str(record.get("job_id", "")), int(record["pid"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _positive(value: object) -> int:
    return value if isinstance(value, int) and 0 < value <= MAX_WORLD_SIZE else 0
