"""``python -m hpcmm.worker``: what the batch script runs on the nodes.

``prepare RUN_DIR``: build and make what has to be there before any rank starts; once a job, on one node.
``nodes``: print the names of the job's nodes, with commas between.
``stage RUN_DIR``: copy ``launch.stage`` to this node's disk, and remove the copy when the input ends.
``staged RUN_DIR NODES``: wait until so many nodes have said on the input that they have their copy.
``port [--hold]``: print a free port of this node, and keep it until this process is ended.
``rank RUN_DIR [-- COMMAND...]``: the start of every rank. It runs COMMAND, by default the rank's task, under the
profiler if the run's configuration asks for this rank, and records how it ended.

Each imports only what it needs, since it delays the job's start. All run in the job's Python, which may have nothing
but its standard library.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hpcmm.cli import run_command
from hpcmm.errors import HpcmmError, ProfilerUnusableError
from hpcmm.resources import keep_compiled_code_to_oneself
from hpcmm.runs.run_dir import RunDir

if TYPE_CHECKING:
    from hpcmm.config.schema import RunConfig
    from hpcmm.worker.environment import RankEnvironment
    from hpcmm.worker.signal_forwarding import RankWatch
    from hpcmm.worker.task import RankSettings

USAGE = """\
usage: python -m hpcmm.worker prepare RUN_DIR
       python -m hpcmm.worker nodes
       python -m hpcmm.worker stage RUN_DIR
       python -m hpcmm.worker staged RUN_DIR NODES
       python -m hpcmm.worker port [--hold]
       python -m hpcmm.worker rank RUN_DIR [-- COMMAND...]"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. A rank that a signal ended ends this process by the same signal."""
    return run_command("hpcmm", _command, arguments, needs_folder=False)


def _command(given: list[str]) -> int:
    step, words = given[:1], given[1:]
    if step in (["prepare"], ["stage"]) and len(words) == 1:
        return (_prepare if step == ["prepare"] else _stage)(RunDir(Path(words[0])))
    if step == ["nodes"] and not words:
        return _nodes()
    if step == ["staged"] and len(words) == 2 and words[1].isdecimal():
        return _staged(RunDir(Path(words[0])), int(words[1]))
    if step == ["port"] and words in ([], ["--hold"]):
        return _port(hold=bool(words))
    if step == ["rank"] and (len(words) == 1 or (words[1:2] == ["--"] and len(words) > 2)):
        from hpcmm.worker.task import rank_process  # noqa: PLC0415

        run = RunDir(Path(words[0]))
        return _rank(run, words[2:] or rank_process(run))
    print(USAGE, file=sys.stderr)
    return 2


def _prepare(run: RunDir) -> int:
    from hpcmm.runs.attempts import SCRIPT_BEGAN, begin_attempt  # noqa: PLC0415
    from hpcmm.worker.prepare import prepare_run  # noqa: PLC0415

    keep_compiled_code_to_oneself()
    prepare_run(run)
    began = os.environ.get(SCRIPT_BEGAN)
    begin_attempt(run, began_s=float(began) if began else None)
    return 0


def _nodes() -> int:
    from hpcmm.node.network import job_nodes  # noqa: PLC0415

    print(",".join(job_nodes(os.environ)))
    return 0


def _stage(run: RunDir) -> int:
    from hpcmm.worker.stage import stage  # noqa: PLC0415
    from hpcmm.worker.task import read_settings  # noqa: PLC0415

    return stage(read_settings(run).config)


def _staged(run: RunDir, nodes: int) -> int:
    from hpcmm.worker.stage import collect  # noqa: PLC0415

    return 0 if collect(run, nodes, iter(sys.stdin.readline, "")) else 1


def _port(*, hold: bool) -> int:
    from hpcmm.node.network import hold_free_port, port_of  # noqa: PLC0415

    with hold_free_port() as held:
        print(port_of(held), flush=True)
        if hold:
            signal.pause()
    return 0


def _rank(run: RunDir, command: list[str]) -> int:
    from hpcmm.node.recorder import rank_of  # noqa: PLC0415
    from hpcmm.worker.signal_forwarding import end_as, record_exit, record_good_end  # noqa: PLC0415

    try:
        status = start_rank(run, command)
    except HpcmmError:
        record_exit(1, run, rank_of(os.environ))
        raise
    if status == 0:
        record_good_end(run, rank_of(os.environ))
    return end_as(status)


def start_rank(run: RunDir, command: list[str]) -> int:
    """Run the rank's command. Returns its exit status, negative for a signal."""
    from hpcmm.annotate.stopping import RESTART_COUNT, RUN_DIR  # noqa: PLC0415
    from hpcmm.config.schema import Executor  # noqa: PLC0415
    from hpcmm.runs import attempts  # noqa: PLC0415
    from hpcmm.worker.environment import RankEnvironment, forget_outer_run, use_copies  # noqa: PLC0415
    from hpcmm.worker.task import read_settings  # noqa: PLC0415

    settings = read_settings(run)
    config = settings.config
    forget_outer_run(has_script=config.cluster.executor is Executor.slurm)
    os.environ[attempts.CAPTURE_BEGAN] = f"{attempts.process_began_s():.3f}"
    keep_compiled_code_to_oneself()
    os.environ[RUN_DIR] = str(run.root.absolute())
    os.environ[RESTART_COUNT] = str(attempts.current_attempt(run) - 1)
    rank_env = RankEnvironment.read()
    rank = rank_env.rank
    if config.cluster.executor is Executor.local:
        _prepare_locally(run, rank)
    else:
        if config.launch.check_rendezvous:
            check_rendezvous(rank_env, config)
        if config.launch.stage:
            use_copies(run)
    with links_recorded(run, rank_env, config.cluster.nodes):
        return _run_rank(run, settings, rank, command)


@contextmanager
def links_recorded(run: RunDir, rank_env: RankEnvironment, nodes: int) -> Iterator[None]:
    """By the first rank of each node of several: what the node's links carry meanwhile."""
    if rank_env.local_rank != 0 or nodes < 2:
        yield
        return
    from hpcmm.node.links import sample  # noqa: PLC0415
    from hpcmm.runs.links import write_links  # noqa: PLC0415

    start = sample()
    write_links(run, rank_env.node, start)
    try:
        yield
    finally:
        write_links(run, rank_env.node, start, sample())


def _run_rank(run: RunDir, settings: RankSettings, rank: int, command: list[str]) -> int:
    """Under the profiler if the run's configuration asks for this rank, and by itself if that cannot be used."""
    from hpcmm.runs import attempts  # noqa: PLC0415
    from hpcmm.worker.signal_forwarding import RankWatch, run_watched  # noqa: PLC0415
    from hpcmm.worker.task import whole_config  # noqa: PLC0415

    config = settings.config
    watch = RankWatch(run, rank, config.launch.hang_s, config.world_size)
    if _is_profiled(config, rank) and not is_finished(whole_config(settings, run), run):
        from hpcmm.worker.nsys_rank import run_profiled  # noqa: PLC0415 -- only where a profiler runs

        try:
            return _left(run_profiled(settings, run, rank, command, watch), watch)
        except ProfilerUnusableError as unusable:
            if config.profile.required:
                raise HpcmmError(f"{unusable}. Set profile.required=false to train without.") from unusable
            print(f"hpcmm: {unusable}; rank {rank} trains without.", file=sys.stderr)
    os.environ[attempts.COMMAND_BEGAN] = f"{time.time():.3f}"
    return _left(run_watched(command, run, rank, watch), watch)


def _left(status: int, watch: RankWatch) -> int:
    if status == 0:
        watch.forget()
    else:
        watch.keep()
    return status


def _prepare_locally(run: RunDir, rank: int) -> None:
    """Without Slurm no script prepares: the first of the ranks does it while the others wait, and the job's log tells
    of it. Then the rank's own log begins, and what counts as its start under the profiler."""
    from hpcmm.runs import attempts  # noqa: PLC0415
    from hpcmm.worker.prepare import prepare_run  # noqa: PLC0415 -- its imports would delay every rank on Slurm

    os.environ[attempts.SCRIPT_BEGAN] = os.environ[attempts.CAPTURE_BEGAN]
    try:
        with run.batch_log.open("ab") as log:
            _send_output_to(log)
            fcntl.flock(log, fcntl.LOCK_EX)
            try:
                prepare_run(run)
            finally:
                sys.stdout.flush()
                fcntl.flock(log, fcntl.LOCK_UN)
    finally:
        with run.rank_log(rank).open("ab") as log:
            _send_output_to(log)
    os.environ[attempts.CAPTURE_BEGAN] = f"{time.time():.3f}"


def _send_output_to(file: IO[bytes]) -> None:
    """This process' and its children's, as srun does with the rank's log on Slurm."""
    os.dup2(file.fileno(), sys.stdout.fileno())
    os.dup2(file.fileno(), sys.stderr.fileno())


def check_rendezvous(rank_env: RankEnvironment, config: RunConfig) -> None:
    """By the first rank of each node: that it could reach rank 0, for PyTorch would try for up to half an hour.

    Raises HpcmmError if the name of rank 0's node does not resolve here, or its port is not reached.
    """
    if rank_env.local_rank != 0 or rank_env.world_size == 1:
        return
    from hpcmm.node.network import rendezvous_problem  # noqa: PLC0415

    problem = rendezvous_problem(
        rank_env.master_addr,
        rank_env.master_port,
        on_its_node=os.environ.get("SLURM_NODEID") == "0",
        patience_s=min(_RENDEZVOUS_PATIENCE_S, config.parallel.rendezvous_timeout_s),
    )
    if problem is not None:
        raise HpcmmError(
            f"rank {rank_env.rank} on {rank_env.node}: MASTER_ADDR {problem}, so the ranks cannot meet. See `getent "
            f"ahosts {rank_env.master_addr}` on {rank_env.node}, and tell the site. launch.check_rendezvous=false "
            "starts ranks that do not need to meet."
        )


_RENDEZVOUS_PATIENCE_S = 20.0


def _is_profiled(config: RunConfig, rank: int) -> bool:
    from hpcmm.ranges import profiled_ranks  # noqa: PLC0415

    profile = config.profile
    return profile.tool is not None and rank in profiled_ranks(
        profile.ranks, config.world_size, config.cluster.ranks_per_node
    )


def is_finished(config: RunConfig, run: RunDir) -> bool:
    """Whether the run has trained all of its steps, or its metric has settled.

    Started once more, it has nothing to record, and its reports would be replaced by empty ones.
    """
    if config.task._target_ is None:
        return False
    from hpcmm.config.workload import load_workload  # noqa: PLC0415
    from hpcmm.runs.metrics import read_settled  # noqa: PLC0415
    from hpcmm.runs.run_dir import steps_in_newest_checkpoint  # noqa: PLC0415

    steps_done = steps_in_newest_checkpoint(run) or 0
    settled = read_settled(run)
    if settled is not None and settled.steps_done == steps_done:
        return True
    return load_workload(config.task._target_).is_finished(config, steps_done)


if __name__ == "__main__":
    sys.exit(main())
