"""The server as a Slurm job: a run of one rank whose task is :func:`serve_in_job`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcmm.config.schema import FUNCTION, Executor, Requeue, TaskConfig
from hpcmm.errors import HpcmmError
from hpcmm.jobs.logs import Log
from hpcmm.runs.run_dir import RunDir
from hpcmm.serve.address import Address, read_address, write_address
from hpcmm.serve.options import ServeOptions
from hpcmm.text import printable, visible

if TYPE_CHECKING:
    from hpcmm.launch.submit import Submission

TARGET = f"{__name__}:serve_in_job"
_LONGEST_S = 5.0
_LOG_LINES = 12
_MOST_LINES = 10_000


def submit(options: ServeOptions, cluster: str, overrides: Sequence[str], runs_root: Path) -> Submission:
    """Queue the server; returns once Slurm has accepted it. Raises HpcmmError if it does not."""
    from hpcmm.config.compose import compose_run  # noqa: PLC0415 -- hydra and submitit, which a server does not need
    from hpcmm.config.sweep import Point  # noqa: PLC0415
    from hpcmm.launch.plan import plan  # noqa: PLC0415
    from hpcmm.launch.submit import submit as submit_job  # noqa: PLC0415
    from hpcmm.launch.write import write  # noqa: PLC0415

    words = [f"cluster={cluster}", f"task={FUNCTION}", "name=serve", *overrides]
    config = compose_run(words)
    if config.cluster.executor is Executor.local:
        raise HpcmmError(f"--cluster {cluster} has no Slurm: leave it out, and the server runs here.")
    place = replace(config.cluster, nodes=1, ranks_per_node=1, gpus_per_node=min(1, config.cluster.gpus_per_node))
    task = TaskConfig(name=FUNCTION, target=TARGET, kwargs=options.values())
    root = config.runs_root if any(word.startswith("runs_root=") for word in overrides) else str(runs_root)
    config = replace(config, cluster=place, task=task, requeue=Requeue.never, runs_root=root)
    planned = plan([Point((), config)], words)
    task = replace(task, kwargs={"job_dir": str(planned.run.root), **task.kwargs})
    point = replace(planned.points[0], config=replace(planned.config, task=task))
    planned = replace(planned, points=(point,), packages=frozenset())  # DeepSpeed's ops are compiled for training alone
    write(planned)
    return submit_job(planned, is_latest=False)


def wait_for_address(submission: Submission) -> Address:
    """Wait until the job answers, saying its state when that changes.

    Raises HpcmmError, with the last lines of its log, where it ends before.
    """
    from hpcmm.runs.submission import identity_of  # noqa: PLC0415
    from hpcmm.slurm.jobs import Job, find_job  # noqa: PLC0415
    from hpcmm.slurm.polling import Poller  # noqa: PLC0415

    def tell(complaint: str) -> None:
        print(f"hpcmm: {complaint} It is asked again.", file=sys.stderr, flush=True)

    known = identity_of(submission.run, submission.job_id)
    poller = Poller(lambda: find_job(known), lambda job: (job.state, job.reason), longest_s=_LONGEST_S, tell=tell)
    shown, address = "", None

    def answers(job: Job) -> bool:
        nonlocal shown, address
        if job.state != shown:
            reason = f" ({job.reason})" if job.active and job.reason else ""
            print(printable(f"job {submission.job_id}: {job.state}{reason}"), file=sys.stderr, flush=True)
            shown = job.state
        address = read_address(submission.run.address)
        return address is not None or not job.active

    job = poller.wait(answers)
    if address is None:
        raise HpcmmError(_ended(submission, job.state))
    return address


def serve_in_job(job_dir: str, **values: Any) -> None:
    """What the job runs. The address goes to a file of the job's run directory that only its owner reads."""
    from hpcmm.serve.server import serve  # noqa: PLC0415 -- torch and gradio

    run = RunDir(Path(job_dir))
    run.address.unlink(missing_ok=True)

    def ready(address: Address) -> None:
        write_address(run.address, address)
        print(f"hpcmm.serve: listening on 127.0.0.1:{address.port} of {address.node}.", flush=True)

    try:
        # Slurm's warning of the time limit makes the job's script leave this file.
        serve(ServeOptions.of(values), ready, run.stop_request.exists, node=_node())
    finally:
        run.address.unlink(missing_ok=True)
    print("hpcmm.serve: ended.", flush=True)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _ended(submission: Submission, state: str) -> str:
    tail: list[str] = []
    for log in (Log("0", submission.run.rank_log(0)), Log("batch", submission.run.batch_log)):
        lines = log.tail(_MOST_LINES)
        tail = [line for line in lines if line.startswith("hpcmm")][-1:] or lines[-_LOG_LINES:]
        if tail:
            break
    told = " ".join(visible(line, "") for line in tail)
    return (
        f"Job {submission.job_id} ended as {state} before the server answered. {told} "
        f"See python -m hpcmm.jobs why {submission.run.root}"
    )
