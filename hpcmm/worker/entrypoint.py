"""One rank, from its process' start to its end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hpcmm.config import config_file
from hpcmm.node.cache import extensions_dir
from hpcmm.node.startup import parts_before
from hpcmm.runs.attempts import current_attempt
from hpcmm.runs.metrics import MetricsWriter
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.environment import RankEnvironment, bound_threads


def run_rank(run_dir: str) -> dict[str, float]:
    """Train as ``config.yaml`` of the run directory says. Returns the final metrics."""
    began_s = time.time()
    run = RunDir(Path(run_dir))
    config = config_file.load(run.config)
    bound_threads(config)
    rank_env = RankEnvironment.read()
    _log_with_rank(rank_env)
    with MetricsWriter(run.rank_metrics(rank_env.rank), current_attempt(run)) as metrics:
        metrics.start(**rank_env.identity())
        for part, duration_s in parts_before(began_s):
            metrics.startup_part(part, duration_s)
        with metrics.startup("imports"):
            from hpcmm.annotate import collectives  # noqa: PLC0415 -- imports torch
            from hpcmm.worker.accelerator import select_accelerator  # noqa: PLC0415 -- imports torch

            select_accelerator()
            from hpcmm.worker.compiled_ops import load_ops  # noqa: PLC0415

            load_ops(extensions_dir(config.cluster))
            # Both import deepspeed, which asks for the accelerator.
            from hpcmm.train.loop import train  # noqa: PLC0415
            from hpcmm.worker.distributed import process_group  # noqa: PLC0415
        with process_group(rank_env, config, metrics) as device:
            collectives.install()
            return train(config, run, rank_env, device, metrics)


def _log_with_rank(rank_env: RankEnvironment) -> None:
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {rank_env.rank} on {rank_env.node} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
