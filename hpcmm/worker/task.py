"""What submitit carries to every rank. Imported on login nodes, so it imports nothing heavy itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.node.recorder import recording_failure
from hpcmm.runs.run_dir import RunDir


@dataclass(frozen=True)
class RankTask:
    """Runs one rank of the job in ``run_dir``."""

    run_dir: str

    def __call__(self) -> Any:
        """Returns the rank's final metrics, or what the user's function returned; submitit hands them back."""
        _keep_files_private()
        with recording_failure(RunDir(Path(self.run_dir))):
            from hpcmm.worker.entrypoint import run_rank  # noqa: PLC0415 -- imports torch, on the node only

            return run_rank(self.run_dir)


def _keep_files_private() -> None:
    """Let nobody else write what the rank writes: nsys starts its target with a umask of 0."""
    os.umask(os.umask(0o022) | 0o022)
