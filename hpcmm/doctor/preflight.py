"""``python -m hpcmm.doctor.preflight``: in the batch script, before the ranks, the check of the job's nodes.

    REQUEST=$(... ask RUN_DIR NODES)                  writes down what the nodes are asked
    srun ... python -m hpcmm.doctor.node REQUEST      is the check, one process a node
    GOOD=$(... choose RUN_DIR NODES REQUEST)          prints the nodes to train on, as srun's --nodelist wants them

The script itself runs srun between the two, since within a container there is no srun. NODES are names with commas
between. As many are chosen as the run needs, without bad ones, for which the job holds spare nodes. Words go to the
batch log, facts to ``RUN/preflight.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hpcmm.cli import run_command
from hpcmm.config.schema import RunConfig
from hpcmm.doctor.checks import bad_nodes, check_findings, report_lines, report_values
from hpcmm.doctor.runner import clean_up, read_answers, write_request
from hpcmm.errors import HpcmmError
from hpcmm.files import write_json
from hpcmm.node.cache import cache_dir
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.task import read_settings


def chosen_nodes(nodes: Sequence[str], bad: Sequence[str], needed: int) -> list[str]:
    """The first ``needed`` good nodes. Raises HpcmmError, naming the bad ones, if there are not so many."""
    good = [node for node in nodes if node not in bad]
    if len(good) < needed:
        raise HpcmmError(
            f"{', '.join(bad)} failed the check before the run, which leaves {len(good)} of {needed} nodes: submit "
            f"again with 'cluster.exclude=\"{','.join(bad)}\"', or with launch.spare_nodes={len(bad)}."
        )
    return good[:needed]


def ask(config: RunConfig, run: RunDir, nodes: Sequence[str]) -> Path:
    """The request, as a file in the run directory. Raises HpcmmError if that cannot be written."""
    return write_request(nodes, _folders(config, run), nsys=config.profile.tool == "nsys")


def _folders(config: RunConfig, run: RunDir) -> list[Path]:
    return [run.root, cache_dir(config.cluster)]


def choose(config: RunConfig, run: RunDir, nodes: Sequence[str], request: Path) -> list[str]:
    """The nodes to train on, by their answers. Raises HpcmmError when too few are good."""
    try:
        result = read_answers(request, nodes)
    finally:
        clean_up(request, _folders(config, run))
    findings = check_findings(nodes, result.found, config.cluster.gpus_per_node)
    print("\n".join(report_lines(nodes, result.found, findings)), file=sys.stderr, flush=True)
    facts = report_values(nodes, result.found, findings)
    write_json(run.preflight, facts, indent=1)
    return chosen_nodes(nodes, bad_nodes(findings, nodes), config.cluster.nodes)


def main(arguments: Sequence[str]) -> int:
    step, run_dir, listed, *request = arguments
    run, nodes = RunDir(Path(run_dir)), listed.split(",")
    config = read_settings(run).config
    if step == "ask":
        print(ask(config, run, nodes))
    else:
        print(",".join(choose(config, run, nodes, Path(request[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("hpcmm", main, needs_folder=False))
