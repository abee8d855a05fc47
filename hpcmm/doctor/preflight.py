"""``python -m hpcmm.doctor.preflight RUN_DIR``: in the batch script, before the ranks, the check of the job's nodes.

Prints the nodes to train on, as srun's --nodelist wants them: as many as the run needs, without bad ones, for which the
job holds spare nodes. Its words go to the batch log, its facts to ``RUN/preflight.json``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcmm import config as run_config
from hpcmm.bootstrap.cache import cache_dir
from hpcmm.config import RunConfig
from hpcmm.doctor.judge import bad_nodes, judge
from hpcmm.doctor.report import report_lines, report_values
from hpcmm.doctor.step import check_nodes
from hpcmm.errors import HpcmmError
from hpcmm.failures.reachable import job_nodes
from hpcmm.run_dir import RunDir

_STEP_MIN = 5


def chosen_nodes(nodes: Sequence[str], bad: Sequence[str], needed: int) -> list[str]:
    """The first ``needed`` good nodes. Raises HpcmmError, naming the bad ones, where there are not so many."""
    good = [node for node in nodes if node not in bad]
    if len(good) < needed:
        raise HpcmmError(
            f"{', '.join(bad)} failed the check before the run, which leaves {len(good)} of {needed} nodes: submit "
            f"again with 'cluster.exclude=\"{','.join(bad)}\"', or with launch.spare_nodes={len(bad)}."
        )
    return good[:needed]


def preflight(config: RunConfig, run: RunDir) -> list[str]:
    """Check the nodes of this Slurm job. Returns those to train on. Raises HpcmmError when too few are good."""
    nodes = job_nodes(os.environ)
    if not nodes:
        raise HpcmmError("launch.preflight checks the nodes of a Slurm job, and this is none: set it to false.")
    folders = [run.root, cache_dir(config.cluster)]
    srun = ["srun", f"--time={_STEP_MIN}"]
    result = check_nodes(nodes, len(nodes), folders, srun, nsys=config.profile.tool == "nsys")
    findings = judge(nodes, result.found, config.cluster.gpus_per_node)
    lines = report_lines(nodes, result.found, findings)
    print("\n".join([*lines, *([result.complaint] if result.complaint else [])]), file=sys.stderr, flush=True)
    facts = report_values(nodes, result.found, findings)
    run.preflight.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return chosen_nodes(nodes, bad_nodes(findings, nodes), config.cluster.nodes)


def main(arguments: list[str]) -> int:
    run = RunDir(Path(arguments[0]))
    try:
        print(",".join(preflight(run_config.load(run.config), run)))
    except HpcmmError as error:
        print(f"hpcmm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
