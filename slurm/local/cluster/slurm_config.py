"""The texts of slurm.conf, gres.conf, cgroup.conf and slurmdbd.conf, as pure functions of the layout."""

from __future__ import annotations

import os

from .layout import GPUS_PER_NODE, Layout

CLUSTER_NAME = "hpcmm"
PARTITION = "main"
URGENT_QOS = "urgent"
"""Jobs of this quality of service preempt all others."""

GRACE_S = 60
"""Seconds that a preempted job may take to end."""

EXTRA = "extra.conf"
"""File in ``etc/`` with lines of one's own for slurm.conf, such as the rules of a site that are to be tried."""

CPUS_PER_NODE = 8
CONTROLLER_PORT = 26817
NODE_PORT = 26818
ACCOUNTING_PORT = 26819


def write(layout: Layout) -> None:
    """Write all four files; slurmdbd insists that its own is closed to others."""
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    extra = layout.etc / EXTRA
    lines = extra.read_text() if extra.is_file() else ""
    layout.slurm_conf.write_text(slurm_conf(layout, memory_mb) + lines)
    (layout.etc / "gres.conf").write_text(gres_conf(layout))
    (layout.etc / "cgroup.conf").write_text("IgnoreSystemd=yes\n")
    accounting = layout.etc / "slurmdbd.conf"
    accounting.touch(mode=0o600)
    accounting.chmod(0o600)
    accounting.write_text(slurmdbd_conf(layout))


def slurm_conf(layout: Layout, memory_mb: int) -> str:
    """The configuration of controller, nodes and commands; ``memory_mb`` is each node's."""
    control = layout.controller
    nodes = "".join(
        f"NodeName={node.name} NodeAddr={node.address} CPUs={CPUS_PER_NODE} RealMemory={memory_mb} "
        f"Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN\n"
        for node in layout.nodes
    )
    node_names = ",".join(node.name for node in layout.nodes)
    return f"""\
# Written by slurm/local/up, at each start.
ClusterName={CLUSTER_NAME}
SlurmctldHost={control.name}({control.address})
SlurmctldPort={CONTROLLER_PORT}
SlurmdPort={NODE_PORT}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket},cred_expire=10
CredType=cred/munge

StateSaveLocation={layout.controller_spool}
SlurmdSpoolDir={layout.spool}/%n
SlurmctldPidFile={layout.run}/slurmctld.pid
SlurmdPidFile={layout.run}/%n.pid
SlurmctldLogFile={layout.logs}/slurmctld.log
SlurmdLogFile={layout.logs}/%n.log

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={control.address}
AccountingStoragePort={ACCOUNTING_PORT}
AccountingStoragePass={layout.munge_socket}
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=30

# Nodes may claim more processors than the machine has; nothing is bound or contained, since they share it.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none

# Jobs start at once, and may be requeued when a node dies.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
JobRequeue=1
ReturnToService=2

# `--qos={URGENT_QOS}` preempts other jobs: they are warned, have {GRACE_S} s to end, and are queued once more.
PreemptType=preempt/qos
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

# Generous where four nodes compete for few processors, short where a user waits.
MessageTimeout=60
TCPTimeout=15
SlurmctldTimeout=60
SlurmdTimeout=60
KillWait=30
InactiveLimit=0
MinJobAge=600

{nodes}
PartitionName={PARTITION} Nodes={node_names} Default=YES DefaultTime=01:00:00 MaxTime=1-00:00:00 State=UP
"""


def gres_conf(layout: Layout) -> str:
    """The stand-in GPUs. Slurm wants a file for each; without one a node is refused for having too few."""
    files = f"{layout.gpus}/gpu[0-{GPUS_PER_NODE - 1}]"
    return "".join(f"NodeName={node.name} Name=gpu File={files}\n" for node in layout.nodes)


def slurmdbd_conf(layout: Layout) -> str:
    """The accounting daemon's configuration; it finds the database's socket by its environment."""
    return f"""\
# Written by slurm/local/up, at each start.
DbdHost={layout.controller.name}
DbdAddr={layout.controller.address}
DbdPort={ACCOUNTING_PORT}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
PidFile={layout.run}/slurmdbd.pid
LogFile={layout.logs}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_accounting
"""
