"""How many threads the libraries of a rank may start for one operation."""

from __future__ import annotations

import os

from hpcmm.config.schema import RunConfig


def threads_per_rank(config: RunConfig) -> int:
    """OpenMP threads of a rank: ``parallel.threads_per_rank``, else its processor cores."""
    return config.parallel.threads_per_rank or config.cluster.cpus_per_rank


def bound_threads(config: RunConfig) -> None:
    """Tell OpenMP and BLAS by their variable, which they read when torch and numpy are imported; one that is set stays.

    Without it their pools take all cores of the node, which its ranks share.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(config)))
