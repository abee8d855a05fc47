"""The accounting database: made once, and the cluster registered in it."""

from __future__ import annotations

import shutil

from . import daemons
from .layout import Layout
from .processes import run
from .slurm_config import CLUSTER_NAME, GRACE_S, URGENT_QOS

INSTALL_TIMEOUT_S = 120


def create_database(layout: Layout) -> None:
    """Make an empty database, once. A half-made one never gets the final name."""
    if layout.database.exists():
        return
    unfinished = layout.database.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    run(
        "mariadb-install-db",
        "--no-defaults",
        f"--datadir={unfinished}",
        "--user=root",
        "--auth-root-authentication-method=socket",
        "--skip-test-db",
        timeout_s=INSTALL_TIMEOUT_S,
        env=daemons.environment(layout),
    )
    unfinished.chmod(0o700)
    unfinished.rename(layout.database)


def register_cluster(layout: Layout) -> None:
    """Tell the accounting daemon of the cluster, so that jobs are recorded from the first on, and who may preempt."""
    environment = daemons.environment(layout)
    known = run("sacctmgr", "-nP", "list", "cluster", "format=cluster", env=environment, timeout_s=90).split()
    if CLUSTER_NAME not in known:
        run("sacctmgr", "-i", "add", "cluster", CLUSTER_NAME, env=environment, timeout_s=90)
    known = run("sacctmgr", "-nP", "list", "qos", "format=name", env=environment, timeout_s=90).split()
    if URGENT_QOS not in known:
        run("sacctmgr", "-i", "modify", "qos", "normal", "set", f"gracetime={GRACE_S}", env=environment, timeout_s=90)
        run("sacctmgr", "-i", "add", "qos", URGENT_QOS, "set", "preempt=normal", env=environment, timeout_s=90)


def require_answer(layout: Layout) -> None:
    """Raises ClusterError when `sacct` cannot read the record of jobs."""
    run("sacct", "-nXP", "--format=jobid", env=daemons.environment(layout), timeout_s=90)
