"""What lies between the job's start and the rank's own code, from each stage's mark in the environment."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

SCRIPT_BEGAN, SRUN_BEGAN, CAPTURE_BEGAN, COMMAND_BEGAN = (
    f"HPCMM_{stage}_BEGAN_S" for stage in ("SCRIPT", "SRUN", "CAPTURE", "COMMAND")
)
"""Environment variables, in the order of time: seconds since 1970 at which each stage began."""

_STAGES = (
    ("scheduler", "SLURM_JOB_START_TIME", SCRIPT_BEGAN),
    ("prepare", SCRIPT_BEGAN, SRUN_BEGAN),
    ("srun", SRUN_BEGAN, CAPTURE_BEGAN),
    ("capture", CAPTURE_BEGAN, COMMAND_BEGAN),
)


def parts_before(now_s: float | None, environ: Mapping[str, str] = os.environ) -> Iterator[tuple[str, float]]:
    """Name and seconds of each part of the start up to ``now_s``, the beginning of the rank's own code.

    Without ``now_s`` up to its interpreter.

    ``scheduler`` counts from Slurm's start of the job, which Slurm gives in whole seconds; the other parts are exact as
    far as the nodes' clocks agree. A part whose marks are missing is left out.
    """
    for part, begin, end in _STAGES:
        if part == "prepare" and SRUN_BEGAN not in environ:  # without Slurm
            end = CAPTURE_BEGAN  # noqa: PLW2901
        if begin in environ and end in environ:
            yield part, max(0.0, float(environ[end]) - float(environ[begin]))
    if COMMAND_BEGAN in environ and now_s is not None:
        yield "interpreter", max(0.0, now_s - float(environ[COMMAND_BEGAN]))


def process_began_s() -> float:
    """When the kernel started this process, in seconds since 1970, to a hundredth.

    psutil's ``create_time`` is up to a second off: it adds the boot time, which the kernel tells in whole seconds.
    """
    after_name = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    ticks = int(after_name[19])  # field 22, `starttime`, of proc_pid_stat(5)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
