"""Run configuration -> the text of its sbatch script. Pure: nothing is read but the template."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hpcmm.config import Requeue, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.resources import resource
from hpcmm.run_dir import RunDir


def render_script(config: RunConfig, run: RunDir, python: str = sys.executable) -> str:
    """The sbatch script of ``config``. Every value from the configuration is quoted for the shell.

    Raises HpcmmError for a value that an ``#SBATCH`` line cannot hold.
    """
    environment = Environment(
        loader=FileSystemLoader(resource("slurm")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 -- a shell script, where the filter `word` quotes
    )
    environment.filters["word"] = lambda value: shlex.quote(str(value))
    environment.filters["directive"] = _directive_value
    return environment.get_template(config.cluster.template).render(
        cluster=config.cluster,
        launch=config.launch,
        requeue=config.requeue,
        directives=_directives(config, run),
        environment=config.cluster.environment,
        run=run,
        python=python,
        rank_log_pattern=_slurm_pattern(run.logs) + "/rank_%4t.log",
        rank_command=rank_command(run, python),
    )


def rank_command(run: RunDir, python: str = sys.executable) -> str:
    """The shell words that start one rank: hpcmm's wrapper around submitit's entry point."""
    submitit = [python, "-u", "-m", "submitit.core._submit", str(run.submitit)]
    return shlex.join([python, "-m", "hpcmm.capture", str(run.root), "--", *submitit])


def _directives(config: RunConfig, run: RunDir) -> dict[str, str | None]:
    """Long options of sbatch, in a fixed order, with the site's own last."""
    cluster = config.cluster
    directives: dict[str, Any] = {
        "job-name": config.name,
        "nodes": cluster.nodes + config.launch.spare_nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "cpus-per-task": cluster.cpus_per_rank,
        "gpus-per-node": cluster.gpus_per_node or None,
        "mem": None if cluster.memory_gb is None else f"{round(cluster.memory_gb * 1024)}M",
        "time": cluster.time_limit_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "output": _slurm_pattern(run.batch_log),
        "open-mode": "append",
        "requeue" if config.requeue is Requeue.on_node_failure else "no-requeue": "",
        "signal": f"B:USR1@{cluster.stop_warning_s}" if cluster.stop_warning_s else None,
    }
    given: dict[str, str | None] = {key: str(value) or None for key, value in directives.items() if value is not None}
    return given | {key: value or None for key, value in cluster.sbatch.items()}


def _slurm_pattern(path: Path) -> str:
    """``path`` where Slurm expects a file name pattern, so that a % in it stays as it is."""
    return str(path).replace("%", "%%")


def _directive_value(value: str) -> str:
    """Quoted as sbatch reads it: within double quotes, where a backslash protects the next character."""
    if "\n" in value or "\r" in value:
        raise HpcmmError(f"An #SBATCH line cannot hold a line break, but this value has one: {value!r}.")
    if shlex.quote(value) == value:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
