"""One rank under the profiler that its run's configuration names, or the reason why it cannot be."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpcmm.annotate.schema import CAPTURE_DOMAIN, CAPTURE_RANGE, CAPTURE_STEPS
from hpcmm.config.schema import ProfileConfig, Requeue
from hpcmm.errors import ProfilerUnusableError
from hpcmm.node.cache import cache_dir
from hpcmm.nsys.capture import current_folder, run_under_nsys
from hpcmm.nsys.probe import NsysFacts, nsys_facts
from hpcmm.nsys.supervisor import HEEDS_SIGTERM_S
from hpcmm.ranges import step_window
from hpcmm.resources import planted
from hpcmm.runs import failures
from hpcmm.runs.attempts import current_attempt
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.signal_forwarding import record_exit
from hpcmm.worker.task import RankSettings

_MOST_PATIENCE_S = 10.0
_GPU_DEVICE = Path("/dev/nvidiactl")


def run_profiled(
    settings: RankSettings, run: RunDir, rank: int, command: Sequence[str], watch: Callable[[], bool] = lambda: False
) -> int:
    """Run ``command`` under nsys and leave the rank's report in the run directory. Returns its exit status,
    which is recorded where it is a bad one. ``watch``: as in :func:`~hpcmm.worker.signal_forwarding.run_watched`.

    Raises ProfilerUnusableError, before anything runs, if this node's nsys is missing or records nothing.
    """
    config = settings.config
    nsys = shutil.which("nsys")
    if nsys is None:
        raise ProfilerUnusableError(
            f"nsys is not on the PATH of {os.uname().nodename}: load its module (cluster.modules)"
        )
    if find_spec("nvtx") is None:
        raise ProfilerUnusableError(
            f"{sys.executable} on {os.uname().nodename} has no nvtx, without which nsys records no step and no "
            "collective: install nvtx there (nvtx==0.2.11 goes with every nsys)"
        )
    facts = nsys_facts(nsys, cache_dir(config.cluster) / "nsys")
    if facts.problem is not None:
        raise ProfilerUnusableError(f"nsys on {os.uname().nodename} cannot be used: {facts.problem}")
    foreign = Path(current_folder()) / "config.ini"  # which nsys' library in the rank reads, and a pipe for ever
    if os.path.lexists(foreign) and (planted(foreign) is not None or not foreign.is_file()):
        raise ProfilerUnusableError(f"nsys would read {foreign}, which is another user's or no file: have it removed")
    flags, dropped = known_flags(
        profile_flags(config.profile, config.known_steps, settings.nsys_flags, gpu=_GPU_DEVICE.exists()), facts
    )
    if dropped:
        print(f"hpcmm: {facts.version} has no {', '.join(dropped)}; recorded without.", file=sys.stderr)
    failed = SomeRankFailed(run, config.cluster.kill_wait_s)
    return run_under_nsys(
        [os.path.abspath(nsys), "profile", *flags],  # noqa: PTH100 -- a word
        command,
        run.rank_report(rank),
        run.reports_before(current_attempt(run)),
        ended=lambda end: record_exit(_signal_or_status(end.status), run, rank, end.unix_ns),
        must_end=lambda: watch() or failed(),
        # A script that saves its checkpoint at SIGTERM may need all of the site's grace time.
        heeds_s=None if config.requeue is Requeue.slurm else HEEDS_SIGTERM_S,
    )


def _signal_or_status(status: int) -> int:
    """nsys ends as a shell does: with 128 and the signal's number, if a signal ended the rank."""
    return 128 - status if 128 < status <= 128 + signal.SIGRTMAX else status


class SomeRankFailed:
    """Whether a rank of the job has ended badly, and this one has had time to notice that by itself.

    srun would kill this rank, and its report with it, ``kill_wait_s`` after the first rank's end.
    """

    def __init__(self, run: RunDir, kill_wait_s: float) -> None:
        self._sign = failures.failed_file(failures.attempt_folder(run))
        self._patience_s = min(_MOST_PATIENCE_S, kill_wait_s / 4)
        self._since_s: float | None = None

    def __call__(self) -> bool:
        if self._since_s is None and self._sign.exists():
            self._since_s = time.monotonic()
        return self._since_s is not None and time.monotonic() - self._since_s >= self._patience_s


def profile_flags(profile: ProfileConfig, steps: int | None, wanted: Mapping[str, Any], *, gpu: bool) -> dict[str, str]:
    """Options of ``nsys profile`` that the profile's file holds, ``wanted``, and those that a window of steps needs.

    ``gpu``: the node has an NVIDIA GPU.
    """
    trace = [*wanted["trace"], *(wanted.get("trace_on_gpu", []) if gpu else [])]
    flags = {"trace": ",".join(trace)} | {name: str(value) for name, value in wanted.get("flags", {}).items()}
    if (window := step_window(profile.steps, steps)) is not None:
        # Without the first variable only registered strings would open the window; the second one says which steps do.
        variables = f"NSYS_NVTX_PROFILER_REGISTER_ONLY=0,{CAPTURE_STEPS}={window.start}:{window.stop}"
        flags |= {
            "capture-range": "nvtx",
            "nvtx-capture": f"{CAPTURE_RANGE}@{CAPTURE_DOMAIN}",
            "capture-range-end": "stop",  # the report is written then, while training goes on
            "env-var": variables,
        }
    return flags


def known_flags(flags: dict[str, str], facts: NsysFacts) -> tuple[list[str], list[str]]:
    """``flags`` as words for this nsys, and the names of those that it does not know."""
    known = {name: value for name, value in flags.items() if name in facts.flags}
    return [f"--{name}={value}" for name, value in known.items()], [f"--{name}" for name in flags if name not in known]
