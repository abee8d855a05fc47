"""Run configuration -> the text of its sbatch script. Pure: nothing is read but the template."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hpcmm.config.schema import ContainerConfig, ContainerEngine, Requeue, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.resources import resource
from hpcmm.runs.run_dir import RunDir


@dataclass(frozen=True)
class Container:
    """A site's container, with the folders that the ranks must see."""

    config: ContainerConfig
    mounts: tuple[str, ...] = ()
    working_directory: str = "/"

    @classmethod
    def of(cls, config: RunConfig, run: RunDir, working_directory: Path) -> Container:
        """With the folders of the run, of its cache and of the launch, and then the site's own."""
        container = config.cluster.container
        if container.engine is None:
            return cls(container)
        from hpcmm.node.cache import given_cache_dir  # noqa: PLC0415 -- importlib.metadata, 20 ms of every dry run

        scratch = [config.cluster.scratch_dir] if config.launch.stage and config.cluster.scratch_dir else []
        own = (str(run.root), str(given_cache_dir(config.cluster)), str(working_directory), *scratch)
        folders = (*own, *container.mounts)
        return cls(container, folders, str(working_directory))

    def inside(self) -> list[str]:
        """What stands in front of a command that srun starts."""
        if self.config.engine is not ContainerEngine.apptainer:
            return []
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", "--pwd", self.working_directory, *binds, *self.config.arguments, self._image()]

    def srun_arguments(self) -> list[str]:
        """What srun itself must be told."""
        if self.config.engine is not ContainerEngine.pyxis:
            return []
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in self.mounts)
        where = [f"--container-mounts={pairs}", f"--container-workdir={self.working_directory}"]
        return [f"--container-image={self._image()}", *where, *self.config.arguments]

    def on_first_node(self) -> list[str]:
        """What stands in front of a command of the batch script itself, which runs outside of any container."""
        if self.config.engine is ContainerEngine.pyxis:
            one_task = ["--export=ALL", "--overlap", "--nodes=1", "--ntasks=1", "--relative=0"]
            return ["srun", *one_task, *self.srun_arguments()]
        return self.inside()

    def _image(self) -> str:
        assert self.config.image is not None  # validated
        return self.config.image


_REQUEUED_BY_SLURM = frozenset({Requeue.on_node_failure, Requeue.slurm})
ANALYSIS_TEMPLATE = "analysis.sbatch.j2"
_ANALYSIS_TIME_MIN = 60
_PREFLIGHT_MIN = 5
_STOP_WARNING_S = 120
"""Time for a step, a checkpoint and the import of a report."""


@dataclass(frozen=True)
class Job:
    """What a script is rendered from, beside the configuration."""

    run: RunDir
    """The run directory; of a sweep the folder that holds those of its points."""
    python_path: tuple[str, ...] = ()
    """Folders that the job's Python searches first."""
    points: int | None = None
    """Number of a sweep's points; None for a single run."""
    after: str | None = None
    """Id of the job that must have completed before."""
    launcher: str = sys.executable
    """The Python that launches."""
    working_directory: Path = field(default_factory=Path.cwd)
    """The folder that the job is launched from, and runs in."""


def render_script(config: RunConfig, job: Job) -> str:
    """The sbatch script of ``config``. Every value from the configuration is quoted for the shell.

    ``cluster.setup`` alone is shell, and stands there as it is written. Raises HpcmmError for a value that an
    ``#SBATCH`` line cannot hold.
    """
    return _render(config.cluster.template, config, job, _directives(config, job))


def render_analysis_script(config: RunConfig, job: Job) -> str:
    """The script of the job that analyses the run, or each point of the sweep, when it is over."""
    return _render(ANALYSIS_TEMPLATE, config, job, _analysis_directives(config, job))


def rank_command(config: RunConfig, run: RunDir) -> list[str]:
    """The words that start one rank: hpcmm's wrapper around submitit's entry point."""
    python = python_of(config)
    submitit = [python, "-P", "-u", "-m", "submitit.core._submit", str(run.submitit)]
    return [python, "-P", "-m", "hpcmm.worker", "rank", str(run.root), "--", *submitit]


def python_of(config: RunConfig, launcher: str = sys.executable) -> str:
    """The Python that runs the ranks."""
    return config.cluster.python or launcher


def _render(template: str, config: RunConfig, job: Job, directives: dict[str, str | None]) -> str:
    environment = Environment(
        loader=FileSystemLoader(resource("slurm")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 -- a shell script, for which the filter `word` quotes
    )
    environment.filters["word"] = lambda value: shlex.quote(str(value))
    environment.filters["words"] = shlex.join
    environment.filters["pattern"] = _slurm_pattern
    environment.filters["directive"] = _directive_value
    container = Container.of(config, job.run, job.working_directory)
    return environment.get_template(template).render(
        cluster=config.cluster,
        module_lines=len(config.cluster.modules) + bool(config.cluster.modules),
        launch=config.launch,
        profile=config.profile,
        requeue=config.requeue,
        directives=directives,
        environment=config.cluster.environment,
        run=job.run,
        is_sweep=job.points is not None,
        resume=_resume(job),
        python=python_of(config, job.launcher),
        python_path=os.pathsep.join(job.python_path),
        once=_prefix(container.on_first_node()),
        inside=_prefix(container.inside()),
        srun_arguments=[*config.cluster.srun, *container.srun_arguments()],
        container_arguments=container.srun_arguments(),
        words_before=_prefix,
        preflight_min=_PREFLIGHT_MIN,
    )


def _resume(job: Job) -> str:
    """What a user types to have a job that stopped go on."""
    if job.points is not None:
        return f"python -m hpcmm.launch resubmit {shlex.quote(str(job.run.root))}"
    return f"sbatch {shlex.quote(str(job.run.submission_script))}"


def _prefix(words: list[str]) -> str:
    return shlex.join(words) + " " if words else ""


def _directives(config: RunConfig, job: Job) -> dict[str, str | None]:
    """Long options of sbatch, in a fixed order, with the site's own last."""
    cluster = config.cluster
    given = _given(
        {
            "job-name": config.name,
            "nodes": cluster.nodes + config.launch.spare_nodes,
            "ntasks-per-node": cluster.ranks_per_node,
            "cpus-per-task": cluster.cpus_per_rank,
            "gpus-per-node": _gpus(config),
            "mem": None if cluster.memory_gb is None else f"{round(cluster.memory_gb * 1024)}M",
            "time": cluster.time_limit_min,
            **_site(config),
            "constraint": cluster.constraint,
            "exclude": cluster.exclude,
            "array": _array(config, job),
            "dependency": None if job.after is None else f"afterok:{job.after}",
            "kill-on-invalid-dep": None if job.after is None else "yes",
            "output": _log_pattern(job, job.run.batch_log),
            "open-mode": "append",
            "requeue" if config.requeue in _REQUEUED_BY_SLURM else "no-requeue": "",
            "signal": _stop_warning(config),
        }
    )
    return given | {key: value or None for key, value in cluster.sbatch.items()} | _export(config)


def _export(config: RunConfig) -> dict[str, str | None]:
    """The site's ``--export``, with the names of ``cluster.environment_from``, whose values sbatch takes itself.

    Names alone do to the rest of the environment what NONE does, beside which sbatch takes no names.
    """
    given, names = config.cluster.sbatch.get("export"), config.cluster.environment_from
    if given is None or not names:
        return {}
    return {"export": ",".join([*([] if given.upper() in ("NONE", "NIL") else [given]), *names])}


def _analysis_directives(config: RunConfig, job: Job) -> dict[str, str | None]:
    return _given(
        {
            "job-name": f"{config.name}-analysis",
            "nodes": 1,
            "ntasks": 1,
            "time": _ANALYSIS_TIME_MIN,
            **_site(config),
            "reservation": config.cluster.sbatch.get("reservation"),
            "clusters": config.cluster.sbatch.get("clusters"),
            "array": _array(config, job),
            "kill-on-invalid-dep": "yes",
            "output": _log_pattern(job, job.run.analysis_log),
        }
    )


def _site(config: RunConfig) -> dict[str, str | None]:
    cluster = config.cluster
    return {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}


def _given(directives: dict[str, Any]) -> dict[str, str | None]:
    """Those that are given; an empty text is an option without a value."""
    return {key: str(value) or None for key, value in directives.items() if value is not None}


def _gpus(config: RunConfig) -> str | None:
    cluster = config.cluster
    if not cluster.gpus_per_node:
        return None
    return f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else str(cluster.gpus_per_node)


def _stop_warning(config: RunConfig) -> str | None:
    cluster = config.cluster
    warning_s = cluster.stop_warning_s
    if config.requeue is Requeue.slurm:  # the ranks themselves are warned, if the user has asked for it
        return f"USR1@{warning_s}" if warning_s else None
    if warning_s is None:
        warning_s = min(_STOP_WARNING_S, 60 * cluster.time_limit_min // 4)
    return f"B:USR1@{warning_s}" if warning_s else None


def _array(config: RunConfig, job: Job) -> str | None:
    if job.points is None:
        return None
    most = config.launch.parallel_points
    return f"0-{job.points - 1}" + (f"%{most}" if most else "")


def _log_pattern(job: Job, log: Path) -> str:
    """Where Slurm writes ``log``; in a sweep, the log of the same name in each point's run directory."""
    if job.points is None:
        return _slurm_pattern(log)
    return f"{_slurm_pattern(job.run.root)}/%4a/{_slurm_pattern(log.relative_to(job.run.root))}"


def _slurm_pattern(path: Path) -> str:
    """``path`` where Slurm expects a file name pattern, so that a % in it stays as it is.

    Raises HpcmmError for a backslash, after which Slurm expands nothing and takes the backslash itself away.
    """
    if "\\" in str(path):
        raise HpcmmError(
            f"Slurm cannot write logs below {path}, for it takes a backslash in a path for something else: set "
            "runs_root to a folder without one."
        )
    return str(path).replace("%", "%%")


def _directive_value(value: str) -> str:
    """Quoted as sbatch reads it: within double quotes, where a backslash protects the next character."""
    if "\n" in value or "\r" in value:
        raise HpcmmError(f"An #SBATCH line cannot hold a line break, but this value has one: {value!r}.")
    if shlex.quote(value) == value:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
