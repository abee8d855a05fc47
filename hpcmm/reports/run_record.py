"""What the run directory itself says about the run: the ranks to expect, and which process was which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcmm.annotate.schema import GroupMark
from hpcmm.config.untyped_config import read_untyped_config, trains_a_workload
from hpcmm.errors import HpcmmError
from hpcmm.files import read_text, resolved
from hpcmm.ranges import MAX_WORLD_SIZE, profiled_ranks
from hpcmm.runs.exit_status import newest_outcome
from hpcmm.runs.links import Network, read_network
from hpcmm.runs.metrics import RankStart, starts_of
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import package_version
from hpcmm.runs.throughput import Throughput, throughput_of

FRAMEWORKS = ("lightning", "accelerate", "transformers", "deepspeed")
"""Those that are told apart; who imports several writes the loop for the first of them."""
_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+(\w+)|import[ \t]+(\w[^#;\n]*))", re.MULTILINE)
_SCRIPT_BYTES = 1 << 20
_MOST_IMPORTS = 50
_MOST_GROUPS = 1000
"""Of a rank; a list of more is damaged."""
_SAME = {"pytorch_lightning": "lightning", "lightning_fabric": "lightning"}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Empty if the reports came without a run directory."""

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
    failed: bool = False
    """The directory notes that the job failed."""
    failed_before_steps: bool = False
    """It notes that and no step of any rank; of a script, whose steps it never notes, the reports know better."""
    nvtx: str = ""
    """Version of the Python package nvtx that the run used; empty if it is not known."""
    throughput: Throughput | None = None
    """What the ranks noted of tokens, operations and memory."""
    groups: Mapping[int, Mapping[str, GroupMark]] = field(default_factory=dict)
    """What the process groups of each rank are for, by their names in its report."""
    network: Network = field(default_factory=Network)
    """What is known of the links between its nodes."""
    framework: str = ""
    """What the run's script trains with, one of :data:`FRAMEWORKS`; empty if its imports name none."""

    @property
    def job_id(self) -> str | None:
        """The job that most ranks name; of a requeued job the start records hold the last one."""
        job_ids = [start.job_id for start in self.starts.values() if start.job_id]
        return max(set(job_ids), key=lambda job: (job_ids.count(job), job)) if job_ids else None

    @property
    def tunable(self) -> dict[str, Any]:
        """The configuration as far as it decides how the ranks run: of the user's script or function, the cluster."""
        cluster = _section(self.config, "cluster")
        return self.config if trains_a_workload(self.config) else {"cluster": cluster} if cluster else {}

    @property
    def cpus(self) -> int:
        """Of the node that has the fewest; 0 if that is not known."""
        return min((start.cpus for start in self.starts.values()), default=0)

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
    ranks = starts_of(run_dir)
    outcome = newest_outcome(run_dir)
    failed = outcome is not None and outcome.failed
    config = read_untyped_config(run_dir.config)
    cluster = _section(config, "cluster")
    nodes, ranks_per_node = _positive(cluster.get("nodes")), _positive(cluster.get("ranks_per_node"))
    world_size = _positive(nodes * ranks_per_node)
    profile = _section(config, "profile")
    return RunRecord(
        world_size=world_size,
        ranks_per_node=ranks_per_node if world_size else 0,
        profiled=_profiled(profile, world_size, ranks_per_node),
        starts={each.last.rank: each.last for each in ranks},
        config=config,
        name=resolved(run_dir.root).name,
        startup={each.last.rank: each.records for each in ranks},
        folder=str(run_dir.root),
        failed=failed,
        failed_before_steps=failed and not any(each.stepped for each in ranks),
        nvtx=package_version(run_dir, "nvtx"),
        throughput=throughput_of(run_dir),
        groups={each.last.rank: _groups(each.records) for each in ranks},
        network=read_network(run_dir),
        framework=_framework(run_dir, _section(config, "task").get("path")),
    )


def _groups(records: Sequence[dict[str, Any]]) -> dict[str, GroupMark]:
    told = [record.get("marks") for record in records if record.get("event") == "groups"]
    listed = told[-1] if told and isinstance(told[-1], list) else []
    marks = [GroupMark.parse(each) for each in listed[:_MOST_GROUPS] if isinstance(each, str)]
    return {mark.group: mark for mark in marks if mark is not None}


def _profiled(profile: dict[str, Any], world_size: int, ranks_per_node: int) -> frozenset[int]:
    if profile.get("tool", "nsys") is None or not world_size:
        return frozenset()
    try:
        return profiled_ranks(str(profile.get("ranks", "all")), world_size, ranks_per_node)
    except HpcmmError:  # not a configuration that a launch would have accepted, so it tells nothing
        return frozenset()


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _positive(value: object) -> int:
    return value if isinstance(value, int) and 0 < value <= MAX_WORLD_SIZE else 0


def _framework(run_dir: RunDir, script: object) -> str:
    """By the imports of the script, and of the modules beside it that it imports; read, never run."""
    if not isinstance(script, str) or not script:
        return ""
    # The path leads into the snapshot of the run directory as it was then, which may lie elsewhere now.
    path = run_dir.code / "project" / script.rpartition("/code/project/")[2]
    named = _imports(path, run_dir)
    beside = [_imports(path.parent / f"{name}.py", run_dir) for name in sorted(named)[:_MOST_IMPORTS]]
    known = named.union(*beside)
    return next((name for name in FRAMEWORKS if name in known), "")


def _imports(path: Path, run_dir: RunDir) -> set[str]:
    try:
        text = read_text(path, _SCRIPT_BYTES, within=run_dir.root)
    except (OSError, ValueError):  # not there, or no script: it names no framework
        return set()
    names = {re.split(r"\W", each.strip())[0] for found in _IMPORT.findall(text) for each in ",".join(found).split(",")}
    return {_SAME.get(name, name) for name in names if name}
