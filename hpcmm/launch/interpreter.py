"""The job's Python, asked before anything is submitted: is it there, can it run a rank, has it what the run needs?
And the variables that the job gets from this shell.

A Python that the job finds only with modules, shell of the site or a container is not known here. Then nothing is
refused for what it seems to lack.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from hpcmm.config.schema import ClusterConfig, Executor, Precision, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.text import visible

OLDEST = (3, 9)
"""Of the Pythons that ranks run on; the launcher and hpcmm's own workloads need the launcher's."""
_OLDEST_OF_WORKLOADS = (3, 11)
_NEEDED_BY_WORKLOADS = ("torch", "deepspeed", "omegaconf", "yaml")
_OF_FP8 = "torchao"
_ASKED_FOR = ("nvtx", *_NEEDED_BY_WORKLOADS, _OF_FP8)
_PATIENCE_S = 30.0
"""The first start of a Python from a shared file system may take so long."""
_NVTX_OF_OLD_NSYS = (0, 2, 11)
_NSYS_OF_NEW_NVTX = (2023, 4)
_QUESTION = """\
import sys
sys.path = [each for each in sys.path if each]
import json
try:
    from importlib.util import find_spec
    found = [each for each in sys.argv[1:] if find_spec(each)]
except Exception:
    found = []
print(json.dumps([list(sys.version_info[:3]), sys.path, found]))
"""
"""For any Python, also one that is too old. The empty entry of its path is the current folder."""


@dataclass(frozen=True)
class Interpreter:
    """What is known here of the job's Python."""

    python: str
    """As the job starts it."""
    version: tuple[int, ...] | None = None
    """None if it was not asked, or did not answer."""
    search_path: tuple[str, ...] = ()
    has: frozenset[str] = frozenset()
    """Of the packages that were asked for."""
    is_certain: bool = False
    """Whether it answers alike in the job: neither modules nor shell of the site come in between."""
    not_asked: str = ""
    """Why it was not."""

    @property
    def version_text(self) -> str | None:
        return None if self.version is None else ".".join(map(str, self.version))

    def packages(self) -> dict[str, str] | None:
        """Versions of the installed packages; None if they are not known."""
        return None if self.version is None else installed_packages(self.search_path)

    def pip(self, *requirements: str) -> str:
        """What a user types to install something."""
        return shlex.join([self.python, "-m", "pip", "install", *requirements])


def installed_packages(search_path: Sequence[str]) -> dict[str, str]:
    """Versions of the packages on a Python's path, from the names of their metadata folders.

    As https://packaging.python.org/en/latest/specifications/binary-distribution-format lays those down; reading the
    metadata of a hundred packages would take longer than all the rest of a launch.
    """
    found: dict[str, str] = {}
    for folder in reversed([*map(Path, filter(None, search_path))]):
        if folder.is_dir():
            for entry in (*folder.glob("*.egg-info"), *folder.glob("*.dist-info")):
                name, _, version = re.sub(r"-py3\.[0-9]+$", "", entry.stem).partition("-")
                found[name] = version
    return dict(sorted(found.items(), key=lambda package: package[0].lower()))


def with_python(config: RunConfig, working_directory: Path) -> RunConfig:
    """``config`` with the job's Python by its absolute path; a word without a folder is looked up by the job.

    ``cluster.python`` may be the folder of an environment, as venv and conda make it. Links are not followed, for the
    link itself tells Python its environment.
    """
    given = config.cluster.python
    if given is None:
        return config
    path = working_directory / os.path.expanduser(given)  # noqa: PTH111 -- pathlib's raises for an unknown user
    inside = path / "bin" / "python"
    if not path.is_dir() and os.sep not in given:
        return config
    python = str(inside if path.is_dir() and os.path.lexists(inside) else path)
    return replace(config, cluster=replace(config.cluster, python=python))


def ask(cluster: ClusterConfig) -> Interpreter:
    """The job's Python, of a cluster that :func:`with_python` has seen.

    Raises HpcmmError for one that is certainly none that can run a rank.
    """
    named = cluster.python or sys.executable
    if cluster.container.engine is not None:
        return Interpreter(named, not_asked="it is in a container")
    is_certain = not (cluster.modules or cluster.setup)
    if os.sep not in named and not is_certain:
        return Interpreter(
            named, not_asked="cluster.modules or cluster.setup may bring another one than this machine has"
        )
    python = named if os.sep in named else shutil.which(named)
    if python is None or not os.path.lexists(python):
        if is_certain:
            raise HpcmmError(_missing(named, cluster))
        return Interpreter(
            named, not_asked="it is not on this machine, and cluster.modules or cluster.setup may bring it"
        )
    if cluster.python is None and "PYTHONPATH" not in cluster.environment:  # which may bring the job more
        has = frozenset(each for each in _ASKED_FOR if find_spec(each) is not None)
        return Interpreter(named, sys.version_info[:3], tuple(sys.path), has, is_certain)
    if problem := _problem_of(Path(python)):
        raise HpcmmError(f"cluster.python is {visible(named)}, {problem}: name a Python, or the folder of a venv.")
    told = _answer(python, cluster)
    if isinstance(told, str):
        if is_certain:
            raise HpcmmError(f"cluster.python is {visible(named)}, which does not run as a Python here: {told}")
        return Interpreter(named, not_asked=f"without cluster.modules and cluster.setup it does not run here ({told})")
    answer = replace(told, python=named, is_certain=is_certain)
    if answer.version is not None and answer.version < OLDEST:
        raise HpcmmError(
            f"cluster.python is {visible(named)}, which is Python {answer.version_text}, but ranks need 3.9 or later: "
            "make an environment with a newer one, or leave cluster.python out."
        )
    return answer


def _missing(named: str, cluster: ClusterConfig) -> str:
    if os.sep not in named:
        said = f"cluster.python is {visible(named)}, which is not on the PATH of this machine"
    else:
        said = f"cluster.python is {visible(named)}, but there is no such file on this machine"
    remedy = "name a Python, or the folder of a venv or conda environment"
    if cluster.executor is Executor.slurm:
        remedy += (
            ". If it is on the nodes alone, put its folder on their PATH by cluster.setup, and name it without a folder"
        )
    return f"{said}: {remedy}."


def _problem_of(python: Path) -> str | None:
    if python.is_dir():
        return "a folder without bin/python"
    if not python.exists():
        return "a link that leads nowhere"
    return None if os.access(python, os.X_OK) else "which cannot be executed"


def _answer(python: str, cluster: ClusterConfig) -> Interpreter | str:
    """What it says of itself, or why it says nothing."""
    command = [python, "-c", _QUESTION, *_ASKED_FOR]
    environ = {**os.environ, **cluster.environment}
    try:
        done = subprocess.run(
            command,
            cwd="/",
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return f"it gave no answer within {_PATIENCE_S:g} s."
    except OSError as error:
        return f"{error.strerror}."
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        version, search_path, has = json.loads(lines[-1])
        return Interpreter(python, tuple(map(int, version)), tuple(map(str, search_path)), frozenset(map(str, has)))
    except (IndexError, ValueError, TypeError, RecursionError):
        words = visible(" ".join(done.stderr.decode(errors="replace").split())[-200:], " ")
        return f"exit status {done.returncode}, {words or 'and it said nothing of itself'}."


def check(config: RunConfig, interpreter: Interpreter, imports: Collection[str]) -> Iterator[str]:
    """A sentence for each thing that the run may lack. ``imports``: packages that the user's code imports.

    Raises HpcmmError if the run cannot do what was asked of it.
    """
    if interpreter.not_asked:
        if config.cluster.container.engine is None:
            yield f"{interpreter.python} is not checked: {interpreter.not_asked}."
        return
    if config.task._target_ is not None and config.cluster.python is not None:
        yield from _for_workloads(config, interpreter)
    if "torch" in imports and "torch" not in interpreter.has and interpreter.is_certain:
        yield f"the script imports torch, which {interpreter.python} does not have: {interpreter.pip('torch')}"
    if config.profile.tool is not None:
        yield from _for_nvtx(config, interpreter)


def _missing_packages(config: RunConfig, interpreter: Interpreter) -> tuple[list[str], str]:
    """What a workload lacks, and what of hpcmm's extras brings it."""
    of_fp8 = [_OF_FP8] if config.parallel.precision is Precision.fp8 else []
    missing = [each for each in (*_NEEDED_BY_WORKLOADS, *of_fp8) if each not in interpreter.has]
    return missing, "extras, train and fp8" if of_fp8 else "extra, train"


def _for_workloads(config: RunConfig, interpreter: Interpreter) -> Iterator[str]:
    missing, extras = _missing_packages(config, interpreter)
    assert interpreter.version is not None
    if interpreter.version < _OLDEST_OF_WORKLOADS:
        raise HpcmmError(
            f"cluster.python is {interpreter.python}, which is Python {interpreter.version_text}, but this workload "
            "needs 3.11 or later: leave cluster.python out, or make an environment with a newer one."
        )
    if missing:
        said = f"{interpreter.python} does not have {', '.join(missing)}, which this workload needs"
        if interpreter.is_certain:
            raise HpcmmError(f"{said}: leave cluster.python out, or install hpcmm there with its {extras}.")
        yield f"{said}, unless cluster.modules or cluster.setup bring it."


def require_packages(config: RunConfig, interpreter: Interpreter) -> None:
    """Raises HpcmmError if the launcher's own Python, which runs the ranks, lacks what a workload needs.

    A dry run needs nothing of it.
    """
    is_own = config.cluster.python is None and interpreter.is_certain and not interpreter.not_asked
    missing, extras = _missing_packages(config, interpreter)
    if config.task._target_ is not None and is_own and missing:
        named = f"hpcmm[{'train,fp8' if _OF_FP8 in missing else 'train'}]"
        raise HpcmmError(
            f"{interpreter.python} does not have {', '.join(missing)}, which this workload needs: install hpcmm with "
            f"its {extras} ('{named}'), or name another Python as cluster.python."
        )


def _for_nvtx(config: RunConfig, interpreter: Interpreter) -> Iterator[str]:
    version = (interpreter.packages() or {}).get("nvtx", "")
    numbers = tuple(int(each) for each in re.findall(r"[0-9]+", version)[:3])
    if "nvtx" in interpreter.has and numbers <= _NVTX_OF_OLD_NSYS:
        return
    old = _old_nsys()
    line = interpreter.pip("nvtx==0.2.11" if old else "nvtx")
    if "nvtx" not in interpreter.has:
        said = f"{interpreter.python} does not have nvtx, without which nsys records no step and no collective"
        if interpreter.is_certain:
            raise HpcmmError(f"{said}: {line} (or profile=off).")
        yield f"{said}, unless cluster.modules or cluster.setup bring it: {line}"
    elif old:
        said = (
            f"{old} of this machine records nothing of nvtx {version}, which {interpreter.python} has. If the nodes "
            f"have the same nsys: {line}"
        )
        if config.profile.required and interpreter.is_certain:
            raise HpcmmError(said)
        yield said


def _old_nsys() -> str | None:
    """The nsys of this machine, by name and version, if it is one that only an older nvtx goes with."""
    nsys = shutil.which("nsys")
    if nsys is None:
        return None
    try:
        done = subprocess.run(
            [nsys, "--version"], cwd="/", capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"version ([0-9]{4})\.([0-9]+)", done.stdout)
    if found is None or (int(found[1]), int(found[2])) >= _NSYS_OF_NEW_NVTX:
        return None
    return f"nsys {found[1]}.{found[2]}"


def as_recorded(config: RunConfig, interpreter: Interpreter) -> dict[str, str | None]:
    """For ``provenance.json``."""
    return {
        "job": config.cluster.python or sys.executable,
        "version": interpreter.version_text,
        "launcher": sys.executable,
        "launcher_version": platform.python_version(),
    }


def check_environment_from(config: RunConfig) -> None:
    """Raises HpcmmError that names each variable of ``cluster.environment_from`` that this process does not have."""
    missing = [name for name in config.cluster.environment_from if name not in os.environ]
    if missing:
        raise HpcmmError(
            f"{', '.join(missing)} of cluster.environment_from is not set in this shell: export it before you launch, "
            "or leave it out."
        )
    if config.cluster.environment_from and config.profile.tool is not None:
        print(
            f"hpcmm: {config.profile.tool} writes the environment of the processes that it sees into its raw reports, "
            f"so {', '.join(config.cluster.environment_from)} may be in them: give the run's nsys folder to nobody.",
            file=sys.stderr,
        )
