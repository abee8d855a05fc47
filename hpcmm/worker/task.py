"""The task of every rank: what the launcher hands to it, and the process that runs it.

The launcher writes ``rank.json`` beside ``config.yaml``, for the standard library reads no YAML, and a rank of the
user's own script has perhaps nothing else. Imported on login nodes too, so it imports nothing heavy itself.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hpcmm.config.schema import ProfileConfig, RunConfig, config_of, toolkit_values
from hpcmm.errors import HpcmmError, ScriptExitError
from hpcmm.files import json_object, read_checked, write_whole
from hpcmm.resources import SAFE_PATH, own_module
from hpcmm.runs.run_dir import RunDir


@dataclass(frozen=True)
class RankSettings:
    """What the ranks of a run and the helpers of its script read."""

    config: RunConfig
    """The toolkit's keys, without those of a workload; see :func:`whole_config`."""
    nsys_flags: Mapping[str, Any] = field(default_factory=dict)
    """What the profile's file in ``profiles/nsys/`` holds; empty without a profiler."""
    uses_deepspeed: bool = True
    """Whether the task imports DeepSpeed, as far as its code tells."""


def write_settings(settings: RankSettings, run: RunDir) -> None:
    """Write ``rank.json``. Raises HpcmmError for arguments of a function that JSON cannot hold, and OSError."""
    values = {
        "config": toolkit_values(settings.config),
        "nsys_flags": dict(settings.nsys_flags),
        "uses_deepspeed": settings.uses_deepspeed,
    }
    kwargs = settings.config.task.kwargs
    if not _is_json(kwargs):
        raise HpcmmError(
            "task.kwargs must hold numbers, texts, lists and dictionaries with texts as keys, for it is handed to the "
            f"ranks as JSON: {kwargs!r} is not."
        )
    write_whole(run.rank_settings, json.dumps(values, indent=1) + "\n", mode=0o444)


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    return all(map(_is_json, value)) if isinstance(value, list) else isinstance(value, (str, int, float, type(None)))


def read_settings(run: RunDir) -> RankSettings:
    """The settings of a run; of one that has no ``rank.json`` from ``config.yaml``, which takes OmegaConf and PyYAML.

    Raises HpcmmError if they are damaged.
    """
    try:
        text, _ = read_checked(run.rank_settings)
    except FileNotFoundError:  # a version before this one launched it
        return _settings_of_yaml(run)
    except (OSError, ValueError) as error:
        raise HpcmmError(f"{run.rank_settings} cannot be read ({error}): is this a run directory?") from error
    values = json_object(text) or {}
    try:
        flags, uses_deepspeed = values["nsys_flags"], values["uses_deepspeed"]
        return RankSettings(config_of(values["config"]), flags, uses_deepspeed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HpcmmError(f"{run.rank_settings} is damaged: put back what hpcmm.launch wrote.") from error


def _settings_of_yaml(run: RunDir) -> RankSettings:
    from hpcmm.config import config_file  # noqa: PLC0415 -- OmegaConf, which not every rank has

    config = config_file.load(run.config)
    return RankSettings(config, nsys_flags_of(config.profile))


def nsys_flags_of(profile: ProfileConfig) -> dict[str, Any]:
    """What the profile's file in ``profiles/nsys/`` holds; empty without a profiler."""
    import yaml  # noqa: PLC0415 -- as above

    from hpcmm.resources import resource  # noqa: PLC0415

    if profile.tool is None or profile.flags_file is None:
        return {}
    text = resource(f"profiles/nsys/{profile.flags_file}").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def whole_config(settings: RankSettings, run: RunDir) -> RunConfig:
    """With the workload's keys, of a run that trains a workload: from ``config.yaml``, as its class may be any."""
    if settings.config.task._target_ is None:
        return settings.config
    from hpcmm.config import config_file  # noqa: PLC0415 -- as above

    return config_file.load(run.config)


@dataclass(frozen=True)
class RankTask:
    """Runs one rank of the job in ``run_dir``. submitit keeps it with its handle of the job."""

    run_dir: str

    def __call__(self) -> Any:
        """Returns the rank's final metrics, or what the user's function returned.

        Raises ScriptExitError if the user's code ended with another status than 0.
        """
        from hpcmm.node.recorder import rank_of, recording_failure  # noqa: PLC0415 -- on the node only
        from hpcmm.worker.signal_forwarding import record_exit  # noqa: PLC0415 -- on the node only

        _keep_files_private()
        run, rank = RunDir(Path(self.run_dir)), os.getpid()
        try:
            with recording_failure(run):
                from hpcmm.worker.entrypoint import run_rank  # noqa: PLC0415 -- on the node only

                return run_rank(self.run_dir)
        except ScriptExitError as ended:
            if os.getpid() == rank:
                record_exit(ended.status, run, rank_of(os.environ), said=ended.said)
            raise


def rank_process(run: RunDir) -> list[str]:
    """Words that start the process of one rank, in this Python."""
    python, *words = own_module("hpcmm.worker.task")
    # -P is for the workers that multiprocessing starts in the rank: they get this Python's own options.
    return [python, *SAFE_PATH, "-u", *words, str(run.root)]


def main(arguments: Sequence[str]) -> int:
    """One rank. Returns its exit status; what the task returns goes to submitit's handle of the job."""
    (run_dir,) = arguments
    run, rank = RunDir(Path(run_dir)), os.getpid()

    def hand_back(outcome: tuple[str, Any]) -> None:
        if os.getpid() == rank:  # and not a process that the program has forked, which ends here as well
            _hand_back(outcome, run)

    try:
        result = RankTask(run_dir)()
    except ScriptExitError as ended:
        hand_back(("error", traceback.format_exc()))
        return ended.status
    except BaseException:
        hand_back(("error", traceback.format_exc()))
        _show_frames_of_program()
        raise
    hand_back(("success", result))
    return 0


def _show_frames_of_program() -> None:
    """Let Python's own end tell of an exception as it would without hpcmm, by the program's hook if it has one."""
    from hpcmm.node.recorder import frames_of_program  # noqa: PLC0415 -- on the node only

    hook = getattr(sys, "excepthook", sys.__excepthook__)

    def show(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        error.__traceback__ = frames_of_program(error)
        hook(kind, error, error.__traceback__)

    sys.excepthook = show


def _hand_back(outcome: tuple[str, Any], run: RunDir) -> None:
    """Leave what a rank returned, or why it failed, as submitit's ``Job.results`` looks for it."""
    from hpcmm.node.recorder import rank_of  # noqa: PLC0415 -- on the node only

    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job_id = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
    path = run.submitit / f"{job_id}_{rank_of(os.environ)}_result.pkl"
    try:
        try:
            content = pickle.dumps(outcome)
        except Exception as error:  # of the returned object's own making, too
            print(f"hpcmm: what the task returned cannot be handed to the launcher ({error}).", file=sys.stderr)
            content = pickle.dumps((outcome[0], None))

        def write(file: IO[bytes]) -> None:
            file.write(content)

        write_whole(path, write)
    except OSError as error:
        print(f"hpcmm: {path} cannot be written ({error.strerror}).", file=sys.stderr)


def _keep_files_private() -> None:
    """Let nobody else write what the rank writes: nsys starts its target with a umask of 0."""
    os.umask(os.umask(0o022) | 0o022)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
