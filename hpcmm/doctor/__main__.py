"""``python -m hpcmm.doctor``: see ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcmm.cli import run_command
from hpcmm.config.compose import compose_run
from hpcmm.config.parts import folders_of, options_of
from hpcmm.config.schema import RunConfig
from hpcmm.config.space import with_config_dirs
from hpcmm.config.validate import cluster_problems
from hpcmm.doctor.checks import HERE, Finding, Weight, check_findings, report_lines, report_values
from hpcmm.doctor.node import facts_here
from hpcmm.doctor.runner import allocation_options, check_nodes, python_of_nodes
from hpcmm.errors import HpcmmError
from hpcmm.files import json_object
from hpcmm.launch.interpreter import Interpreter, ask, with_python
from hpcmm.node.cache import cache_dir, check_cache_dir
from hpcmm.resources import environment_of_modules, own_module
from hpcmm.runs.ownership import check_runs_root
from hpcmm.slurm.commands import outside_of_jobs
from hpcmm.slurm.sbatch import check_slurm_conf, on_one_line, remedy
from hpcmm.text import printable

_TIME_LIMIT_MIN = 8

EPILOG = """\
examples:
  python -m hpcmm.doctor                                  this machine alone
  python -m hpcmm.doctor cluster=local_slurm --nodes 4    a short job on four nodes, and this machine
  python -m hpcmm.doctor cluster=mysite --nodes 2 --nodelist gpu07,gpu08

exit status: 0 nothing is bad (there may be warnings), 1 something is, or the check itself failed.
docs/doctor.md tells what is checked, and from which value on it counts as bad.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.doctor") -> int:
    """The command line; returns the exit status."""
    return run_command("hpcmm.doctor", lambda given: _command(_parser(prog).parse_intermixed_args(given)), arguments)


def _command(options: argparse.Namespace) -> int:
    config = compose_run(with_config_dirs(options.overrides, options.config_dir))
    if problems := list(cluster_problems(config)):
        raise HpcmmError("\n".join(problems))
    return _check(config, options)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Check this machine, and the nodes of a cluster, for what breaks or slows multi-node training.",
        epilog=f"clusters: {_clusters()}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of hpcmm.launch: cluster=NAME ...")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="folder of your own clusters")
    parser.add_argument("--nodes", type=int, default=0, metavar="N", help="check N nodes in a job of their own")
    parser.add_argument("--nodelist", metavar="LIST", help="these nodes, as a Slurm host list")
    parser.add_argument("--wait", type=int, default=120, metavar="S", help="seconds to wait for nodes (default: 120)")
    parser.add_argument("--no-nsys", action="store_true", help="do not record a range with nsys (saves 10 s a node)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _clusters() -> str:
    """The names that ``cluster=`` takes here, as argparse wants them."""
    return printable(", ".join(options_of("cluster", folders_of(None)))).replace("%", "%%")


def _check(config: RunConfig, options: argparse.Namespace) -> int:
    examined = examine(config, options.nodes, options.nodelist, options.wait, nsys=not options.no_nsys)
    if options.json:
        print(json.dumps(report_values(examined.names, examined.found, examined.findings), indent=2))
    else:
        print("\n".join(report_lines(examined.names, examined.found, examined.findings)))
    return 1 if examined.is_bad else 0


@dataclass(frozen=True)
class Examined:
    """What was found out: of this machine, whose name comes first, and of the nodes."""

    names: list[str]
    found: dict[str, dict[str, Any]]
    findings: list[Finding]

    @property
    def is_bad(self) -> bool:
        return any(finding.weight is Weight.bad for finding in self.findings)


def examine(config: RunConfig, count: int, nodelist: str | None, wait_s: int, *, nsys: bool) -> Examined:
    """Check this machine, and ``count`` nodes in a job of their own. Raises HpcmmError if Slurm gives none."""
    config = with_python(config, Path.cwd())
    os.environ.update(config.cluster.submit_environment)
    folders = [Path(config.runs_root).expanduser().absolute(), cache_dir(config.cluster)]
    if count > 0:
        check_runs_root(folders[0] / "of-a-check")
        check_cache_dir(config.cluster)
    interpreter = ask(config.cluster)
    here = _facts_here(interpreter, folders, nsys=nsys)
    login = f"{here['node']} {HERE}"
    found: dict[str, dict[str, Any]] = {login: here}
    nodes: list[str] = []
    if count > 0:
        check_slurm_conf()
        srun = ["srun", *allocation_options(config.cluster, _TIME_LIMIT_MIN), f"--immediate={wait_s}"]
        srun += [f"--nodelist={nodelist}"] if nodelist else []
        srun += [f"--exclude={config.cluster.exclude}"] if config.cluster.exclude else []
        environ = outside_of_jobs(os.environ)
        python = python_of_nodes(config.cluster)
        result = check_nodes(None, count, folders, srun, nsys=nsys, environ=environ, python=python)
        nodes = result.nodes
        found |= result.found
        if not nodes:
            raise HpcmmError(_refused(config, count, result.complaint))
    names = [login, *nodes]
    findings = check_findings([login], found) + check_findings(nodes, found, config.cluster.gpus_per_node)
    findings += [] if not nodes or interpreter.not_asked else _against_nodes(login, found, nodes)
    if interpreter.not_asked:
        said = f"what is said of it is of the Python that launches, for {interpreter.python} is not known here: "
        findings.append(Finding(login, "Python", Weight.note, said + interpreter.not_asked))
    return Examined(names, found, findings)


def _facts_here(interpreter: Interpreter, folders: list[Path], *, nsys: bool) -> dict[str, Any]:
    """What this machine tells of itself, by the job's Python if that is known here."""
    if interpreter.not_asked or interpreter.python == sys.executable:
        return facts_here(folders, nsys=nsys)
    command = [
        *own_module("hpcmm.doctor.node", interpreter.python),
        "here",
        "yes" if nsys else "no",
        *map(str, folders),
    ]
    done = subprocess.run(
        command, env=environment_of_modules(), capture_output=True, text=True, errors="replace", check=False
    )
    found = json_object(done.stdout)
    if done.returncode != 0 or found is None:
        words = " ".join(done.stderr.split())[-300:]
        raise HpcmmError(f"{interpreter.python} cannot check this machine: {words or 'it said nothing'}.")
    return found


def _refused(config: RunConfig, nodes: int, complaint: str) -> str:
    said = on_one_line("srun", complaint)
    asked = replace(config, cluster=replace(config.cluster, nodes=nodes))
    return f"No node was checked: {said.removesuffix('.')}. {remedy(asked, said) or ''}".rstrip()


def _against_nodes(login: str, found: dict[str, dict[str, Any]], nodes: list[str]) -> list[Finding]:
    """What this machine's Python and packages have other than a node's: jobs are composed here and run there."""
    model = next((node for node in nodes if found.get(node)), None)
    if model is None:
        return []
    pair = {name: {key: found[name][key] for key in ("python", "packages", "nsys")} for name in (login, model)}
    return [
        each
        for each in check_findings([login, model], pair)
        if each.check in {"Python", "packages"} and each.node == login
    ]


if __name__ == "__main__":
    sys.exit(main())
