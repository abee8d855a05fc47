"""A command behind ``--``: a script, ``-m MODULE`` or an executable, with its words as they were typed.

No word of it goes through Hydra's grammar, so each reaches the program as the shell has handed it over.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from hpcmm.annotate.stopping import RUN_DIR
from hpcmm.config.keys import leaves
from hpcmm.config.schema import FUNCTION, SCRIPT, ParallelConfig, RunConfig, TaskConfig, TrainConfig
from hpcmm.errors import HpcmmError

SEPARATOR = "--"
_PYTHON = re.compile(r"python(?:3(?:\.[0-9]+)?)?")
_SHELLS = frozenset(("sh", "bash", "dash", "zsh", "ksh"))
_LAUNCHERS = frozenset(("torchrun", "accelerate", "deepspeed"))
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands", "deepspeed.launcher")
_MORE = ("task.path", "task.module", "task.program", "task.args", "task.target", "task.kwargs")
"""Keys that say what runs, as a command does."""


def split(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Overrides, and the command behind the first ``--``; None without one."""
    given = list(words)
    if SEPARATOR not in given:
        return given, None
    place = given.index(SEPARATOR)
    return given[:place], given[place + 1 :]


def task_of(command: Sequence[str]) -> TaskConfig:
    """What a command runs. Raises HpcmmError if it names nothing that can run."""
    if not command or not command[0]:
        raise HpcmmError("Nothing follows --: name a script, -m MODULE or an executable there, with its arguments.")
    first, *rest = command
    if first.startswith("-m"):
        module = first[2:] or (rest.pop(0) if rest else "")
        if not module:
            raise HpcmmError("-m needs the name of a module: write -- -m package.module ARGUMENTS.")
        return TaskConfig(SCRIPT, module=module, args=rest)
    if first.startswith("-"):
        raise HpcmmError(f"{first} is not a script, -m MODULE or an executable: write -- python {shlex.join(command)}.")
    if first.endswith(".py"):
        return TaskConfig(SCRIPT, path=first, args=rest)
    return TaskConfig(SCRIPT, program=first, args=rest)


def with_command(config: RunConfig, command: Sequence[str], swept: Sequence[str] = ()) -> RunConfig:
    """``config`` with a command as its task; what ``task.args`` sweeps comes behind the command's own words.

    ``swept``: the keys that are swept. Raises HpcmmError if the configuration says otherwise what runs.
    """
    task = config.task
    if task.name != SCRIPT or task._target_ is not None:
        raise HpcmmError(
            f"A command follows --, which task=script runs, but the task is {task.name}: leave out either."
        )
    given = [name for name in _MORE if getattr(task, name.partition(".")[2])]
    if wrong := [name for name in given if name != "task.args" or name not in swept]:
        raise HpcmmError(f"{wrong[0]} is given, and a command follows --: leave it out, and write all of it behind --.")
    chosen = _with_own_python(task_of(command), config)
    return replace(config, task=replace(chosen, args=[*chosen.args, *task.args]))


def _with_own_python(task: TaskConfig, config: RunConfig) -> TaskConfig:
    """``python train.py`` as ``train.py``, and ``python -m`` as ``-m``, if that is the Python that runs the ranks.

    Its options (``python -u``) leave it a program.
    """
    words = task.args
    if task.program is None or not words or not _PYTHON.fullmatch(PurePath(task.program).name):
        return task
    cluster = config.cluster
    in_doubt = cluster.container.engine is not None or (
        (cluster.setup or cluster.modules) and os.sep not in task.program
    )
    is_option = words[0].startswith("-") and not words[0].startswith("-m")
    if in_doubt or is_option or not _in_one_folder(task.program, cluster.python or sys.executable):
        return task
    chosen = task_of(words)
    return chosen if chosen.program is None else TaskConfig(SCRIPT, path=chosen.program, args=chosen.args)


@cache
def _in_one_folder(*programs: str) -> bool:
    found = [shutil.which(os.path.expanduser(program)) for program in programs]  # noqa: PTH111 -- no user raises
    return None not in found and len({Path(str(each)).absolute().parent for each in found}) == 1


def words_of(task: TaskConfig, python: str) -> list[str]:
    """The command line of a script, module or executable."""
    if task.program is not None:
        return [task.program, *task.args]
    return [python, *(["-m", task.module] if task.module is not None else [str(task.path)]), *task.args]


def starts_workers(task: TaskConfig) -> str | None:
    """The name of a launcher that starts the workers of a node itself, such as torchrun; None for other programs."""
    words = words_of(task, "python") if task.name == SCRIPT else []
    if task.program is not None and PurePath(task.program).name in _LAUNCHERS:
        return PurePath(task.program).name
    module = task.module
    if task.program is not None and _PYTHON.fullmatch(PurePath(task.program).name):
        module = next((words[place + 1] for place, word in enumerate(words[:-1]) if word == "-m"), None)
    return module if module is not None and module.startswith(_LAUNCHER_MODULES) else None


def is_launcher(config: RunConfig) -> bool:
    """Whether a rank is for certain no worker itself, but one process a node that starts the workers."""
    cluster = config.cluster
    alone = cluster.ranks_per_node == 1 and config.task._target_ is None
    return alone and (cluster.gpus_per_node > 1 or starts_workers(config.task) is not None)


def note_on_rank(config: RunConfig) -> str | None:
    """What a user may not expect of one process on a node of several GPUs; None for launchers, who know."""
    cluster = config.cluster
    if not is_launcher(config) or starts_workers(config.task) is not None:
        return None
    return (
        f"cluster.ranks_per_node is 1 and gpus_per_node is {cluster.gpus_per_node}: the program is to start its node's "
        "workers itself, so RANK and WORLD_SIZE are not set. For one rank a GPU: cluster.ranks_per_node="
        f"{cluster.gpus_per_node}; for one rank with one GPU: cluster.gpus_per_node=1."
    )


def place_of_script(task: TaskConfig, folder: Path) -> int | None:
    """The index in ``task.args`` of the script that a launcher, a Python or a shell is told to run in ``folder``.

    None if there is none, and for any other program, whose words mean what only it knows.
    """
    name = PurePath(task.program or "").name
    is_shell = name in _SHELLS
    if task.name != SCRIPT or not (is_shell or _PYTHON.fullmatch(name) or starts_workers(task)):
        return None
    for place, word in enumerate(task.args):
        if word in ("-m", "--module", "-c", "--no-python", "--no_python") or (is_shell and word.startswith("-c")):
            return None
        is_script = word.endswith(".py") or (is_shell and not word.startswith("-"))
        if is_script and "\0" not in word and len(word) < _LONGEST and (folder / word).is_file():
            return place
    return None


_LONGEST = 1000


def existing_script(path: str | None, folder: Path) -> Path:
    """The file that ``task.path`` means in ``folder``. Raises HpcmmError if there is none."""
    assert path is not None  # validated
    try:
        script = folder / Path(path).expanduser()
        if script.is_file():
            return script.resolve()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that is closed, another's home
        raise HpcmmError(f"task.path is {path[:200]}, which cannot be looked up ({error}).") from error
    raise HpcmmError(f"task.path is {path}, but there is no such file in {folder}.")


def require_program(config: RunConfig, folder: Path) -> None:
    """Raises HpcmmError if ``task.program`` is an executable neither in ``folder``, by its path, nor on the PATH.

    Nothing is said of what a container, modules or lines of ``cluster.setup`` may bring.
    """
    program, cluster = str(config.task.program), config.cluster
    if cluster.container.engine is not None:
        return
    if os.sep in program:
        file = folder / os.path.expanduser(program)  # noqa: PTH111 -- no user raises
        if not os.path.isfile(file):  # noqa: PTH113 -- of any name
            raise HpcmmError(f"{program} is not a file in {folder}.")
        if not os.access(file, os.X_OK):
            with_what = "python" if _shebang(file).find(b"python") >= 0 else "bash"
            raise HpcmmError(f"{program} is not executable: chmod +x it, or write -- {with_what} {program}.")
        return
    own = os.path.dirname(os.path.expanduser(cluster.python or sys.executable))  # noqa: PTH111, PTH120 -- as above
    searched = os.pathsep.join(filter(None, [os.environ.get("PATH"), own]))
    if shutil.which(program, path=searched) or cluster.setup or cluster.modules or "PATH" in cluster.environment:
        return
    hint = f": write -- ./{program} for the file here" if (folder / program).is_file() else ""
    raise HpcmmError(f"{program} is not an executable on the PATH{hint}.")


def script_of_program(task: TaskConfig, folder: Path) -> Path | None:
    """The script, of a shell for instance, that ``task.program`` names by a path; None for what is compiled.

    What lies in a virtual environment is none of the project's either.
    """
    if task.program is None or os.sep not in task.program:
        return None
    file = Path(os.path.realpath(folder / os.path.expanduser(task.program)))  # noqa: PTH111 -- no user raises
    environment = file.parent.parent
    if any((environment / name).exists() for name in ("pyvenv.cfg", "conda-meta")) or not _shebang(file):
        return None
    return file if os.access(file, os.X_OK) else None


def _shebang(file: Path) -> bytes:
    """The beginning of a text; nothing of a file that is none, or cannot be read."""
    try:
        with file.open("rb") as opened:
            start = opened.read(_LOOKED_AT) if file.is_file() else b""
    except OSError:
        return b""
    return b"" if b"\0" in start else start


_LOOKED_AT = 128


def module_files(task: TaskConfig) -> list[str]:
    """Where a launcher or a Python of its own looks for the module of its ``-m``, before the copy of it."""
    words = task.args if task.program is not None or starts_workers(task) else []
    name = next((words[place + 1] for place, word in enumerate(words[:-1]) if word in ("-m", "--module")), "")
    path = name.replace(".", "/")
    return [f"{path}.py", f"{path}/__main__.py", f"{path}/__init__.py"] if name else []


_READ_BY_ALL = frozenset({"parallel.threads_per_rank", "parallel.rendezvous_timeout_s"})


def refuse_keys_without_effect(config: RunConfig, given: Collection[str]) -> None:
    """Raises HpcmmError if ``config`` runs a script or function, and sets what only hpcmm's own training reads.

    ``given``: the keys that were named, which may have the value that is the default.
    """
    if config.task._target_ is not None:
        return
    named = [key for key in given if key.startswith(("train.", "parallel.")) or key in ("train", "parallel")]
    sections: tuple[tuple[str, Any, Any], ...] = (
        ("train.", config.train, _TRAIN),
        ("parallel.", config.parallel, _PARALLEL),
    )
    for prefix, section, default in sections:
        if section != default:
            usual = {key: value for key, value, _ in leaves(default, prefix)}
            named += [key for key, value, _ in leaves(section, prefix) if value != usual[key]]
    if without := sorted(set(named) - _READ_BY_ALL):
        own = "script's own argument, in task.args or behind --"
        if config.task.name == FUNCTION:
            own = "function's own argument, in task.kwargs"
        raise HpcmmError(
            f"{', '.join(without)} would have no effect, for only hpcmm's own training reads it: leave it out, and "
            f"give the {own}."
        )


_TRAIN, _PARALLEL = TrainConfig(), ParallelConfig()


def what_runs(task: TaskConfig, folder: Path) -> tuple[str | None, ...]:
    """What runs in ``folder``, whichever way it is named; of a launcher the script that it is to run, too."""
    place = place_of_script(task, folder) if task.program or task.module else None
    return (task.path, task.module, task.program, None if place is None else task.args[place])


# What two points of a sweep would both write.

_OUTPUT = re.compile(
    r"(?:--?)?(?P<name>(?:[\w.]+[._-])?(?:out|output|save|log|logging|checkpoint|ckpt|result|work)s?[_-]?"
    r"(?:dir|directory|folder|root)|(?:out|output|save|result)s?(?:[_-](?:path|file|to))?|(?<=-)o)(?:=(?P<value>.*))?",
    re.DOTALL,
)


def outputs_of(words: Sequence[str]) -> dict[str, str]:
    """Arguments that by their names say where a program writes, with their values: ``--out_dir=out``, ``-o out``."""
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        match = _OUTPUT.fullmatch(word)
        if match is None:
            continue
        if match["value"] is not None:
            found[match["name"]] = match["value"]
        elif word.startswith("-") and place + 1 < len(words):
            found[match["name"]] = words[place + 1]
    return found


def _of(count: int, lines: Sequence[object]) -> str:
    return f"all {count}" if count == len(lines) else f"{count} of the {len(lines)}"


def note_on_outputs(tasks: Sequence[TaskConfig], reads_run_dir: bool, folder: Path) -> str | None:
    """A sentence if points of a sweep may write the same, as far as their command lines tell; None if not.

    ``tasks``: those of all points, which run in ``folder``. ``reads_run_dir``: their script knows its point's folder.
    """
    lines = [[*words_of(task, ""), *(f"{key}={value}" for key, value in task.kwargs.items())] for task in tasks]
    if len(lines) < 2 or reads_run_dir or all(any(RUN_DIR in word for word in line) for line in lines):
        return None
    own = f"${RUN_DIR} is the folder of each point alone"
    outputs = [outputs_of(line) for line in lines]
    for name in dict.fromkeys(name for each in outputs for name in each):
        values = Counter(each.get(name) for each in outputs)
        if None not in values and len(values) == len(lines):
            return None
        value, count = max(values.items(), key=lambda item: (item[0] is not None, item[1]))
        if value is not None and count > 1:
            return (
                f"{_of(count, lines)} points are told by {name} to write to {value}, where one may replace "
                f"what another has written: sweep {name} too, or have the script write to ${RUN_DIR}, the folder of "
                "each point alone."
            )
    _, count = Counter(map(tuple, lines)).most_common(1)[0]
    if count > 1:
        return (
            f"{_of(count, lines)} points run the same command in {folder}, so one may replace what another "
            f"writes there: {own}."
        )
    return (
        f"all {len(lines)} points run in {folder}: a file that the script writes by one name at each of them is "
        f"replaced by the others: {own}."
    )
