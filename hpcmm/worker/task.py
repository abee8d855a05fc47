"""What submitit carries to every rank. Imported on login nodes, so it imports nothing heavy itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hpcmm.errors import ScriptExitError
from hpcmm.runs.run_dir import RunDir


@dataclass(frozen=True)
class RankTask:
    """Runs one rank of the job in ``run_dir``."""

    run_dir: str

    def __call__(self) -> Any:
        """Returns the rank's final metrics, or what the user's function returned; submitit hands them back.

        Raises ScriptExitError, and has this process end with its status, if the user's code did.
        """
        from hpcmm.node.recorder import rank_of, recording_failure  # noqa: PLC0415 -- on the node only
        from hpcmm.worker.signal_forwarding import record_exit  # noqa: PLC0415 -- on the node only

        _keep_files_private()
        _leave_signals_alone()
        run = RunDir(Path(self.run_dir))
        try:
            with recording_failure(run):
                from hpcmm.worker.entrypoint import run_rank  # noqa: PLC0415 -- imports torch, on the node only

                return run_rank(self.run_dir)
        except ScriptExitError as ended:
            record_exit(ended.status, run, rank_of(os.environ), said=ended.said)
            _end_with(ended.status)
            raise


def _leave_signals_alone() -> None:
    """Undo submitit's handlers: what Slurm sends is for the user's code, and submitit would requeue the job itself."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)


def _end_with(status: int) -> None:
    """Have Python end with ``status`` and no traceback, once submitit has kept the exception for its caller."""

    def leave(*_: object) -> NoReturn:
        sys.exit(status)

    sys.excepthook = leave
    logging.getLogger("submitit").addFilter(lambda record: "triggered an exception" not in record.getMessage())


def _keep_files_private() -> None:
    """Let nobody else write what the rank writes: nsys starts its target with a umask of 0."""
    os.umask(os.umask(0o022) | 0o022)
