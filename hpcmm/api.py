"""What ``import hpcmm`` gives beside the packages: launch a run, analyse reports, compare runs.

>>> import hpcmm
>>> submission = hpcmm.launch_run(["experiment=anomaly_demo", "profile=nsys"])
>>> submission.job_id, submission.run.root
>>> submission.job.results()                                # waits until the job is over
>>> run = hpcmm.analyze_reports(submission.run.root)
>>> run.bottlenecks()                                       # one method a table, each a pandas DataFrame
>>> hpcmm.compare_runs("runs/before", run).table

Each function imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcmm.errors import HpcmmError

if TYPE_CHECKING:
    from hpcmm.analysis.compare import Comparison
    from hpcmm.analysis.pop_metrics import Reference
    from hpcmm.analyze import Analysis
    from hpcmm.analyze.analysis import Paths
    from hpcmm.launch.submit import Submission
    from hpcmm.reports.report import Progress


def launch_run(overrides: Sequence[str]) -> Submission:
    """Compose a run from Hydra overrides, check it, write its run directory and submit it, as ``hpcmm launch`` does.

    ``overrides``: words such as ``"cluster=a30"`` and ``"train.steps=20"``. Returns once the job is accepted.

    Raises HpcmmError if anything is wrong; nothing is queued then. So it does for a sweep, ``dry_run=true`` and
    ``wait=true``, which are the command's. The run directory of a job that Slurm refused is removed again.
    """
    from hpcmm.config.compose import compose_run  # noqa: PLC0415 -- hydra
    from hpcmm.launch.plan import launch  # noqa: PLC0415 -- hydra, submitit

    if isinstance(overrides, str):
        raise HpcmmError(f'Give a list of overrides: ["{overrides}"].')
    config = compose_run(overrides)
    for key, given in (("dry_run", config.dry_run), ("wait", config.wait)):
        if given:
            raise HpcmmError(f"{key}=true is for the command line: leave it out, or run `hpcmm launch`.")
    return launch(overrides)


def analyze_reports(
    paths: Paths,
    out: str | Path | None = None,
    *,
    tables: Collection[str] | None = None,
    reference: Reference | None = None,
    keep_cache: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Analyse the nsys reports under ``paths``: run directories, names of runs in ``./runs``, folders, report files.

    Nothing is written unless ``out`` names a folder (or :meth:`Analysis.write` is called). With ``tables``, names of
    tables, no more is done than these need. ``reference`` is what :func:`hpcmm.analyze.runs.read_reference` gives.
    With ``keep_cache`` the SQLite exports stay in ``out/cache``.

    Raises HpcmmError if nothing there is usable, and for a table that does not exist.
    """
    from hpcmm.analyze import analyze  # noqa: PLC0415 -- pandas

    return analyze(paths, out, tables=tables, reference=reference, keep_cache=keep_cache, progress=progress)


def compare_runs(run_a: Paths | Analysis, run_b: Paths | Analysis, *, progress: Progress | None = None) -> Comparison:
    """What got better or worse from ``run_a``, the older, to ``run_b``, beyond the noise of both runs' steps.

    Each is an analysis, a run directory, reports, or the folder of tables that an analysis wrote.

    Raises HpcmmError if one of them has nothing to compare.
    """
    from hpcmm.analyze import compare  # noqa: PLC0415 -- pandas

    return compare(run_a, run_b, progress=progress)
