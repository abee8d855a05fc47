"""Run configuration -> the text of its sbatch script. Pure: nothing is read but the template."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hpcmm.config.command import is_launcher, words_of
from hpcmm.config.schema import FUNCTION, SCRIPT, ContainerConfig, ContainerEngine, Requeue, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.ranges import profiled_ranks
from hpcmm.resources import PACKAGE, own_module, resource
from hpcmm.runs.run_dir import RunDir
from hpcmm.text import printable


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
    """Number of a sweep's points, or of those in this one of its arrays; None for a single run."""
    first: int = 0
    """The point that is task 0 of the array."""
    parallel_points: int | None = None
    """How many of the array's tasks may run at once; None: as the configuration says."""
    after: str | None = None
    """Id of the job that must have completed before."""
    launcher: str = sys.executable
    """The Python that launches."""
    working_directory: Path = field(default_factory=Path.cwd)
    """The folder that the job is launched from, and runs in."""

    @property
    def package(self) -> Path:
        """The copy of hpcmm's package that the job uses."""
        return Path(self.python_path[0], PACKAGE.name) if self.python_path else PACKAGE


def arrays_of(job: Job, most_tasks: int | None, parallel_points: int | None) -> tuple[Job, ...]:
    """The arrays of a sweep, of at most ``most_tasks`` tasks each (None: of any number); a single run is as it is.

    A power of ten of points each, if one array cannot hold all: then a point's folder is its array's first digits and
    the task's number, which Slurm can write in the name of a log.
    """
    if job.points is None:
        return (job,)
    size = job.points if most_tasks is None or job.points <= most_tasks else 10 ** (len(str(most_tasks)) - 1)
    firsts = range(0, job.points, size)
    shares = parallel_shares(parallel_points, len(firsts))
    return tuple(
        replace(job, first=first, points=min(size, job.points - first), parallel_points=share)
        for first, share in zip(firsts, shares, strict=True)
    )


def parallel_shares(parallel_points: int | None, arrays: int) -> list[int | None]:
    """Each array's share of the points that may run at once, at least one: Slurm bounds an array, and not several."""
    if not parallel_points:
        return [None] * arrays
    share, more = divmod(parallel_points, arrays)
    return [max(1, share + (place < more)) for place in range(arrays)]


def render_script(config: RunConfig, job: Job) -> str:
    """The sbatch script of ``config``. Every value from the configuration is quoted for the shell.

    ``cluster.setup`` alone is shell, and stands there as it is written. Raises HpcmmError for a value that an
    ``#SBATCH`` line cannot hold.
    """
    return _render(config.cluster.template, config, job, _directives(config, job))


def render_analysis_script(config: RunConfig, job: Job) -> str:
    """The script of the job that analyses the run, or each point of the sweep, when it is over."""
    return _render(ANALYSIS_TEMPLATE, config, job, _analysis_directives(config, job))


def rank_command(config: RunConfig, run: RunDir, job: Job) -> list[str]:
    """The words that start one rank."""
    return [*own_module("hpcmm.worker", python_of(config, job.launcher), job.package), "rank", str(run.root)]


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
        first_point=job.first,
        python=python_of(config, job.launcher),
        launcher=job.launcher,
        start=own_module("", package=job.package)[1],
        python_path=os.pathsep.join(job.python_path),
        own_path="".join(job.python_path[:1]),
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
            **cluster.gpu_request,
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
    most = job.parallel_points or config.launch.parallel_points
    return f"0-{job.points - 1}" + (f"%{most}" if most else "")


def _log_pattern(job: Job, log: Path) -> str:
    """Where Slurm writes ``log``; in a sweep, the log of the same name in each point's run directory."""
    if job.points is None:
        return _slurm_pattern(log)
    return f"{_slurm_pattern(job.run.root)}/{_point_pattern(job.first)}/{_slurm_pattern(log.relative_to(job.run.root))}"


def _point_pattern(first: int) -> str:
    """The name of a point's folder, made of the task's number (``%a``): ``1%3a`` for the points from 1000 on."""
    if not first:
        return "%4a"
    digits = len(str(first)) - len(str(first).rstrip("0"))
    head = str(first // 10**digits).zfill(max(0, 4 - digits))
    return f"{head}%{digits}a" if digits else head


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


def rank_comment(config: RunConfig, job: Job) -> str:
    """The command of each rank, what it ends in, and which ranks a profiler wraps."""
    names = "HPCMM_NODE_RANK" if is_launcher(config) else "RANK, LOCAL_RANK, WORLD_SIZE"
    names += ", MASTER_ADDR and MASTER_PORT"
    lines = [
        f"srun starts {config.world_size} ranks, each as:",
        f"  {shlex.join(rank_command(config, job.run, job))}",
        f"which runs, with {names} set, {_task(config)}",
        f"under a profiler: {_profiled(config)}",
    ]
    return "".join(f"# {printable(each)}\n" for line in lines for each in line.splitlines())


def _task(config: RunConfig) -> str:
    task = config.task
    if task.name == SCRIPT:
        return shlex.join(words_of(task, python_of(config)))
    if task.name == FUNCTION:
        arguments = ", ".join(f"{key}={value!r}" for key, value in task.kwargs.items())
        return f"{task.target} as a function of ({arguments})"
    return f"the task {task.name}"


def _profiled(config: RunConfig) -> str:
    if config.profile.tool is None:
        return "none"
    ranks = profiled_ranks(config.profile.ranks, config.world_size, config.cluster.ranks_per_node)
    listed = ", ".join(map(str, sorted(ranks)[:16])) + (" ..." if len(ranks) > 16 else "")
    return f"{config.profile.tool}, with the flags of profiles/nsys/{config.profile.flags_file}, on ranks {listed}"
