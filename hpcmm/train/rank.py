"""One rank, from its process' start to its end."""

from __future__ import annotations

import logging
from pathlib import Path

from hpcmm import config as run_config
from hpcmm.annotate import collectives
from hpcmm.bootstrap.accelerator import select_accelerator
from hpcmm.bootstrap.cache import extensions_dir
from hpcmm.bootstrap.compiled_ops import load_ops
from hpcmm.bootstrap.environment import RankEnvironment
from hpcmm.bootstrap.group import process_group
from hpcmm.bootstrap.metrics import MetricsWriter
from hpcmm.run_dir import RunDir


def run_rank(run_dir: str) -> dict[str, float]:
    """Train as ``config.yaml`` of the run directory says. Returns the final metrics."""
    run = RunDir(Path(run_dir))
    config = run_config.load(run.config)
    place = RankEnvironment.read()
    _log_with_rank(place)
    select_accelerator()
    with MetricsWriter(run.rank_metrics(place.rank)) as metrics:
        metrics.start(place)
        with metrics.startup("imports"):
            load_ops(extensions_dir(config.cluster))
            from hpcmm.train.loop import train  # noqa: PLC0415 -- imports deepspeed, which asks for the accelerator
        with process_group(place, config, metrics) as device:
            collectives.install()
            return train(config, run, place, device, metrics)


def _log_with_rank(place: RankEnvironment) -> None:
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {place.rank} on {place.node} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
