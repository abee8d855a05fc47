"""What must hold between the values of a run before it may queue. Types and key names are the schema's matter."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hpcmm.config.command import starts_workers
from hpcmm.config.keys import leaves, out_of_bounds
from hpcmm.config.mesh import DATA, Mesh
from hpcmm.config.optimisation import optimisation_problems
from hpcmm.config.parts import own_error, part_problems
from hpcmm.config.recipe import recipe_of
from hpcmm.config.schema import (
    FUNCTION,
    SCRIPT,
    SUBMIT_VARIABLES,
    Analyze,
    Executor,
    Requeue,
    RunConfig,
)
from hpcmm.config.workload import workload_of
from hpcmm.errors import HpcmmError
from hpcmm.ranges import profiled_ranks, step_window
from hpcmm.resources import resource

_MOST_MEMORY_GB = 1e6
_BASH_S = 10
_TOKEN = "SLURM_JWT"  # noqa: S105 -- the name of the variable that holds it
_LONGEST_NAME = 200
"""A folder's name has 255 characters at most, and this one gets the time appended."""
_OF_THE_RANKS = "hpcmm writes it from cluster.nodes, ranks_per_node and cpus_per_rank"
_OF_THE_CALL = "hpcmm would not learn which job was submitted"
_ONE_COMPONENT = "the ranks of a run are alike, on the nodes of one component, so launch one run for each"
_NOT_OPTIONS_OF_A_SITE = {
    "array": "sweep a key, such as train.seed=1,2,3",
    "dependency": "use after=JOB",
    "cluster": "use cluster.sbatch.clusters=NAME",
    "job-name": "use name=NAME",
    "output": "hpcmm writes all logs below runs_root",
    "time": "use cluster.time_limit_min",
    "nodes": _OF_THE_RANKS,
    "ntasks": _OF_THE_RANKS,
    "ntasks-per-node": _OF_THE_RANKS,
    "cpus-per-task": _OF_THE_RANKS,
    **dict.fromkeys(("hetjob", "packjob", "het-group", "pack-group"), _ONE_COMPONENT),
    **dict.fromkeys(("parsable", "quiet", "test-only", "wait", "wrap", "help", "usage", "version"), _OF_THE_CALL),
}
_SLURM_S_OWN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_")
_OF_THE_SCRIPT = frozenset({"MASTER_ADDR", "MASTER_PORT", "SUBMITIT_EXECUTOR"})


def cluster_problems(config: RunConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong."""
    yield from _cluster(config)
    yield from _folders(config)
    yield from _shell_words(config)
    yield from _warning(config)
    yield from _container(config)


def is_unwritable(text: str) -> bool:
    """Whether no script, or no UTF-8 file, can hold ``text``."""
    return "\0" in text or any("\ud800" <= character <= "\udfff" for character in text)


def is_file_of(name: str, folder: str) -> bool:
    """Whether ``name`` is the plain name of a file in hpcmm's own ``folder``."""
    return any(name == entry.name and entry.is_file() for entry in resource(folder).iterdir())


def _cluster(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    if cluster.gpus_per_node and cluster.ranks_per_node not in (1, cluster.gpus_per_node):
        yield (
            f"cluster.ranks_per_node is {cluster.ranks_per_node} and gpus_per_node is {cluster.gpus_per_node}: "
            "each rank drives one GPU, so make them equal; a script that starts its own workers takes "
            "cluster.ranks_per_node=1."
        )
    if cluster.executor is Executor.local and cluster.nodes != 1:
        yield f"cluster.nodes is {cluster.nodes}, but the local executor has this machine alone: set cluster.nodes=1."
    if not is_file_of(cluster.template, "slurm"):
        yield f"cluster.template is {cluster.template!r}, but slurm/ holds no such file."
    if cluster.memory_gb is not None and not 0.001 <= cluster.memory_gb <= _MOST_MEMORY_GB:
        yield f"cluster.memory_gb is {cluster.memory_gb}, but must be the GB of a node's memory."


def _folders(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        yield f"name is {config.name!r}: use letters, digits, dots, dashes and underscores, for it names a folder."
    elif len(config.name) > _LONGEST_NAME:
        yield f"name has {len(config.name)} characters, but it names a folder: use at most {_LONGEST_NAME}."
    if not config.runs_root or not config.runs_root.isprintable() or "%" in config.runs_root:
        yield f"runs_root is {config.runs_root!r}: name a folder without control characters and percent signs."
    elif not _has_a_home(config.runs_root):
        yield f"runs_root is {config.runs_root!r}, but there is no such user's home."
    elif not (whole := str(Path(config.runs_root).expanduser().absolute())).isprintable() or "%" in whole:
        yield (
            f"runs_root is {config.runs_root!r}, which is {whole!r}: set it to a folder whose whole path has no "
            "control characters and percent signs."
        )
    if cluster.cache_dir is not None and not _has_a_home(cluster.cache_dir):
        yield f"cluster.cache_dir is {cluster.cache_dir!r}, but there is no such user's home."


def _shell_words(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    for key, value in {**cluster.environment, **cluster.submit_environment}.items():
        if is_unwritable(value):
            yield f"cluster.environment.{key} holds bytes that a script cannot."
    yield from _credentials(config)
    for key in cluster.submit_environment:
        if key not in SUBMIT_VARIABLES:
            yield (
                f"cluster.submit_environment.{key} cannot be set: it takes {' and '.join(SUBMIT_VARIABLES)} alone, so "
                "set the variable in your shell, or give sbatch's option in cluster.sbatch."
            )
    for key in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            yield f"cluster.environment has {key!r}, which is not a name of an environment variable."
    for word in cluster.srun:
        if word == ":" or word.startswith(("--het-group", "--pack-group")):
            yield f"cluster.srun has {word!r}, which belongs to a heterogeneous job: {_ONE_COMPONENT}."
        if word.startswith("--export=") and not {"ALL", "MASTER_ADDR"} & set(word.removeprefix("--export=").split(",")):
            yield f"cluster.srun has {word}, so that no rank would see MASTER_ADDR: begin its list with ALL."
    yield from _environment_from(config)
    for key in cluster.sbatch:
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            yield (
                f"cluster.sbatch has {key!r}, which is no long option of sbatch without its dashes"
                + (": write cluster.sbatch.clusters." if key == "M" else ".")
            )
        elif key in _NOT_OPTIONS_OF_A_SITE:
            yield f"cluster.sbatch.{key} cannot be given: {_NOT_OPTIONS_OF_A_SITE[key]}."


def _credentials(config: RunConfig) -> Iterator[str]:
    """A token in the configuration would be written into the run's files, and into the job's script."""
    cluster = config.cluster
    variables = [*cluster.environment, *cluster.submit_environment]
    texts = [*cluster.sbatch.values(), *cluster.srun, *cluster.setup, *cluster.container.arguments]
    if _TOKEN in variables or any(f"{_TOKEN}=" in text for text in texts):
        yield f"{_TOKEN} would be written into the run's files: set it in the shell that you launch from."


def _environment_from(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    for given in cluster.environment_from:
        name, _, value = given.partition("=")
        if value:  # it may be a secret, so that it is not repeated
            yield (
                f"cluster.environment_from has a value for {name!r}: give the name alone, and set the variable in the "
                "shell that you launch from."
            )
        elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", given):
            yield f"cluster.environment_from has {given!r}, which is not a name of an environment variable."
        elif given in cluster.environment:
            yield f"{given} is in cluster.environment and in cluster.environment_from: leave it out of one of them."
        elif given.startswith(_SLURM_S_OWN):
            yield f"cluster.environment_from has {given}, but Slurm's own variables do not go from job to job."
        elif given in _OF_THE_SCRIPT:
            yield f"cluster.environment_from has {given}, which the job's script sets itself: leave it out."


def _warning(config: RunConfig) -> Iterator[str]:
    warning_s, limit_s = config.cluster.stop_warning_s, 60 * config.cluster.time_limit_min
    if warning_s is not None and warning_s >= limit_s:
        yield (
            f"cluster.stop_warning_s is {warning_s}, but the whole job has {limit_s} s: raise cluster.time_limit_min, "
            "or set a shorter warning."
        )


def _container(config: RunConfig) -> Iterator[str]:
    container = config.cluster.container
    if container.engine is None:
        if container.image:
            yield "cluster.container.image is given, but no engine: set cluster.container.engine to pyxis or apptainer."
        return
    if not container.image:
        yield f"cluster.container.engine is {container.engine}, but there is no image: set cluster.container.image."
    if config.cluster.executor is Executor.local:
        yield "cluster.container needs Slurm, and the local executor has none: leave it out."
    for mount in container.mounts:
        if not mount.startswith("/") or "," in mount:
            yield f"cluster.container.mounts has {mount!r}: write /source or /source:/target, without commas."


def _has_a_home(folder: str) -> bool:
    """Whether a ``~`` in front of ``folder`` means something."""
    try:
        Path(folder).expanduser()
    except RuntimeError:
        return False
    return True


ZERO_STAGES = range(4)
_MOST_RANKS = 1_000_000
_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"


def validate(config: RunConfig) -> None:
    """Raises HpcmmError with one sentence for each thing that is wrong."""
    if config.world_size > _MOST_RANKS:
        raise HpcmmError(
            f"cluster.nodes x cluster.ranks_per_node is {config.world_size}, more ranks than any cluster has."
        )
    if problems := list(_lists(config)):
        raise HpcmmError("\n".join(problems))
    problems = [
        *out_of_bounds(config),
        *_task(config),
        *_workers(config),
        *_batch(config),
        *cluster_problems(config),
        *_handover(config),
        *part_problems(config),
        *optimisation_problems(config),
        *_workload(config),
        *_parallel(config),
        *_profile(config),
        *_launch(config),
    ]
    if problems:
        raise HpcmmError("\n".join(problems))


def check_model(config: RunConfig, file: Path) -> None:
    """Raises HpcmmError if the configuration that was read from ``file`` has values of which no model can be made.

    Each launch refuses them, so the file is damaged, or of another version of hpcmm.
    """
    if problems := [*out_of_bounds(config), *_workload(config)]:
        raise HpcmmError(f"{file} has values that no run can have: {' '.join(problems)}")


def _workload(config: RunConfig) -> list[str]:
    """What the run's workload finds wrong."""
    workload = workload_of(config)
    if workload is None:
        return []
    try:
        return list(workload.problems(config))
    except HpcmmError:
        raise
    except Exception as error:  # whatever the workload's own code raises
        raise HpcmmError(f"{config.task._target_}.problems failed: {own_error(error)}.") from error


def _lists(config: RunConfig) -> Iterator[str]:
    """Lists within lists, which OmegaConf lets pass."""
    for key, value, _ in leaves(config):
        if isinstance(value, list) and any(isinstance(each, (list, dict)) for each in value):
            yield f"{key} is {value}, but must be a plain list: quote what holds brackets."


def _task(config: RunConfig) -> Iterator[str]:
    task = config.task
    if task._target_ is None and task.name not in (SCRIPT, FUNCTION):
        yield f"task.name is {task.name!r}, which is not a task by itself: choose a workload as task=NAME."
    if task.name == SCRIPT and not (task.path or task.module or task.program):
        yield "task=script needs a script: give it as task.path=train.py, or write -- train.py ARGUMENTS at the end."
    if len(named := [key for key in ("path", "module", "program") if getattr(task, key)]) > 1:
        yield f"task.{named[0]} and task.{named[1]} are given, and one of them runs: leave out the other."
    if task.module is not None and not re.fullmatch(_DOTTED, task.module):
        yield f"the module is {task.module!r}: name it as Python imports it, as in -- -m package.module."
    if task.name == FUNCTION and not re.fullmatch(_DOTTED + ":" + _DOTTED, task.target or ""):
        yield f"task.target is {task.target!r}: name a function as package.module:function."
    wrong = {
        "task.path": task.path and task.name != SCRIPT,
        "task.module": task.module and task.name != SCRIPT,
        "task.program": task.program and task.name != SCRIPT,
        "task.args": task.args and task.name != SCRIPT,
        "task.target": task.target and task.name != FUNCTION,
        "task.kwargs": task.kwargs and task.name != FUNCTION,
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            fitting = "function" if key in ("task.target", "task.kwargs") else "script"
            yield f"{key} is given, but the task is {task.name}: add task={fitting}, or leave it out."
    if any(is_unwritable(word) for word in (task.path or "", task.program or "", *task.args)):
        yield "task.path or task.args holds a NUL byte, which no command line can, or bytes that are no UTF-8."


def _workers(config: RunConfig) -> Iterator[str]:
    """Of a node with one process, what starts a process for each GPU."""
    cluster, launcher = config.cluster, starts_workers(config.task)
    if config.task._target_ is not None and cluster.ranks_per_node == 1 < cluster.gpus_per_node:
        yield (
            f"cluster.ranks_per_node is 1 and gpus_per_node is {cluster.gpus_per_node}: each rank of a workload drives "
            "one GPU, so make them equal."
        )
    if launcher is not None and cluster.ranks_per_node > 1:
        yield (
            f"{launcher} starts the workers of a node itself, and cluster.ranks_per_node is {cluster.ranks_per_node}: "
            "set cluster.ranks_per_node=1, or leave the launcher out and write -- train.py ARGUMENTS."
        )
    elif launcher is not None and cluster.nodes > 1 and launcher.startswith(("accelerate", "deepspeed")):
        yield (
            f"{launcher} takes the node's number as an argument, which differs between the {cluster.nodes} nodes: call "
            "it in a shell, with $HPCMM_NODE_RANK (docs/launching.md has the line), or write -- torchrun train.py."
        )


def _batch(config: RunConfig) -> Iterator[str]:
    train, wanted = config.train, config.train.global_batch_size
    try:
        mesh = recipe_of(config).mesh(config)
    except HpcmmError:  # which _parallel says
        return
    if wanted is not None and wanted != config.global_batch_size:
        per_step = train.gradient_accumulation_steps * mesh.data
        fits = wanted > 0 and wanted % per_step == 0
        remedy = f"set train.micro_batch_size={wanted // per_step}" if fits else f"choose a multiple of {per_step}"
        yield (
            f"train.global_batch_size is {wanted}, but micro_batch_size {train.micro_batch_size} x "
            f"gradient_accumulation_steps {train.gradient_accumulation_steps} x {_data_ranks(mesh)} is "
            f"{config.global_batch_size}: {remedy}."
        )


def _data_ranks(mesh: Mesh) -> str:
    return f"world size {mesh.data}" if mesh.model_parallel == 1 else f"{mesh.data} ranks of the data axis"


def _handover(config: RunConfig) -> Iterator[str]:
    local = config.cluster.executor is Executor.local
    if config.analyze is Analyze.after and config.profile.tool is None:
        yield "analyze=after needs reports to analyse: add profile=nsys."
    if local and config.analyze is Analyze.after and not config.wait:
        yield "analyze=after has no queue to wait in with cluster=local: add wait=true."
    if local and config.requeue is Requeue.slurm:
        yield "requeue=slurm needs Slurm, and cluster=local has none: leave it out."
    if local and config.after is not None:
        yield f"after={config.after} needs Slurm's queue, and cluster=local has none: leave it out."
    if any("\n" in line or "\0" in line for line in config.cluster.setup):
        yield "cluster.setup has an entry of several lines: write each line as an entry of its own."
    elif config.cluster.setup and not local:
        yield from _open_at_the_end(tuple(config.cluster.setup))


@cache
def _open_at_the_end(lines: tuple[str, ...]) -> tuple[str, ...]:
    """What bash says against these lines by themselves, such as that a quote is not closed; nothing without a bash."""
    text = "\n".join(lines).encode(errors="surrogateescape")
    said = ""
    for options in ((), ("-O", "extglob")):  # which a line may set for those after it
        try:
            done = subprocess.run(  # bash reads a file, here a pipe, by numbered lines, and runs nothing
                ["bash", *options, "-n", "/dev/stdin"],
                input=text,
                capture_output=True,
                check=False,
                timeout=_BASH_S,
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},  # no function that is exported
            )
        except (OSError, subprocess.TimeoutExpired):
            return ()
        if not done.stderr:
            return ()
        said = said or done.stderr.decode(errors="replace").splitlines()[0].removeprefix("/dev/stdin: ")
    number = int(re.findall(r"\bline (\d+)", said)[-1]) if re.search(r"\bline \d", said) else len(lines)
    number = min(max(number, 1), len(lines))
    reason = re.sub(r"^(line \d+: )?(warning: )?", "", said)
    return (
        f"bash cannot read cluster.setup line {number} (`{lines[number - 1]}`): {reason}. Close what is left open up "
        "to there, such as a quote or a here-document, or mend the line.",
    )


def _parallel(config: RunConfig) -> Iterator[str]:
    """What the run's recipe refuses."""
    if config.parallel.zero_stage not in ZERO_STAGES:
        yield f"parallel.zero_stage is {config.parallel.zero_stage}, but ZeRO has the stages 0, 1, 2 and 3."
        return
    if config.task._target_ is None and config.parallel._target_ is None:
        return
    workload = workload_of(config)
    axes, shape = (
        (frozenset({DATA}), None) if workload is None else (workload.axes(config), workload.model_shape(config))
    )
    yield from recipe_of(config).problems(config, axes, shape)


def _profile(config: RunConfig) -> Iterator[str]:
    profile = config.profile
    if profile.tool is None:
        return
    if profile.tool != "nsys":
        yield f"profile.tool is {profile.tool!r}, but nsys is the only profiler that hpcmm wraps ranks with."
    if profile.flags_file is None or not is_file_of(profile.flags_file, "profiles/nsys"):
        yield f"profile.flags_file is {profile.flags_file!r}, but profiles/nsys/ holds no such file."
    try:
        profiled_ranks(profile.ranks, config.world_size, config.cluster.ranks_per_node)
    except HpcmmError as error:
        yield str(error)
    try:
        step_window(profile.steps, config.known_steps)
    except HpcmmError as error:
        yield str(error)


def _launch(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    if launch.preflight and config.cluster.executor is Executor.local:
        yield "launch.preflight checks the nodes of a Slurm job: set it to false with cluster=local."
    yield from _stage(config)
    if launch.spare_nodes > 0 and not launch.preflight:
        yield f"launch.spare_nodes is {launch.spare_nodes}, but only launch.preflight=true uses spare nodes."
    for entry in launch.include:
        if not entry.strip() or is_unwritable(entry):
            yield f"launch.include has {entry!r}: name a file or folder of your project, such as assets/vocab.txt."


def _stage(config: RunConfig) -> Iterator[str]:
    cluster, sources = config.cluster, config.launch.stage
    if sources and cluster.executor is Executor.local:
        yield "launch.stage copies data to the nodes of a Slurm job, and cluster=local has none: leave it out."
    for source in sources:
        if not Path(source).name or Path(source).name == ".." or is_unwritable(source):
            yield f"launch.stage has {source!r}: name a file or a folder that has a name."
    names = [Path(source).name for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        same = " and ".join(source for source in sources if Path(source).name == name)
        yield f"launch.stage has {same}, whose copies would both be named {name}: stage the folder that holds both."
    scratch = cluster.scratch_dir
    if scratch is not None and (not scratch.startswith(("/", "$")) or is_unwritable(scratch)):
        yield f"cluster.scratch_dir is {scratch!r}, but must be an absolute path, which may begin with a $VARIABLE."
    if sources and cluster.container.engine is not None and (scratch is None or "$" in scratch):
        yield (
            "launch.stage in a container needs a folder that is mounted into it: set cluster.scratch_dir to a folder "
            "of the nodes, without variables."
        )
