"""Why sbatch refused a job, and what to do about it: one sentence each for the refusals that sites see most."""

from __future__ import annotations

from hpcmm.config.schema import ClusterConfig, RunConfig
from hpcmm.text import visible

CANNOT_START = {
    "PartitionConfig": "breaks a limit of its partition",
    "PartitionNodeLimit": "node count",
    "BadConstraints": "node count",
    "PartitionTimeLimit": "time limit",
    "PartitionDown": "partition not available",
    "PartitionInactive": "partition not available",
    "AccountNotAllowed": "account or account/partition",
    "QOSNotAllowed": "qos",
    "InvalidAccount": "account",
    "InvalidQOS": "qos",
    **dict.fromkeys(
        (
            f"{whose}{limit}"
            for whose in ("QOS", "Assoc")
            for limit in ("MaxWallDurationPerJobLimit", "MaxNodePerJobLimit", "MaxCpuPerJobLimit", "MaxGRESPerJob")
        ),
        "accounting/qos policy",
    ),
}
"""Reasons to wait that waiting does not mend, with the words in which sbatch refuses the same elsewhere."""


_NO_CONFIGURATION = (
    "No Slurm configuration is found: set SLURM_CONF to your cluster's, or launch with cluster=local_slurm, which "
    "knows that of the local cluster (make cluster-up starts it)."
)


def cannot_start(config: RunConfig, reason: str) -> str:
    """What to do about a job that waits for one of ``CANNOT_START``."""
    return remedy(config, CANNOT_START[reason]) or _UNKNOWN


_UNKNOWN = "Change the cluster settings and try again."
_UNCERTAIN = (
    "timed out",
    "send/recv",
    "zero bytes",
    "unexpected message",
    "communication",
    "connection reset",
    "broken pipe",
    "endpoint",
)
"""Words of an answer that was lost on its way: the controller may have queued the job all the same."""


def is_certain(returncode: int, complaint: str, answer: str) -> bool:
    """Whether sbatch's failure leaves no doubt that nothing is queued: it said why, and had an answer for that."""
    lowered = complaint.lower()
    return (
        returncode > 0
        and bool(complaint.strip())
        and "submitted batch job" not in answer.lower()
        and not any(words in lowered for words in _UNCERTAIN)
    )


def refusal(config: RunConfig, complaint: str) -> str:
    """sbatch's own words, on one line and without control characters, and the cure."""
    said = on_one_line("sbatch", complaint)
    return f"Slurm refused the job ({said}). {remedy(config, said) or _UNKNOWN}"


def on_one_line(command: str, complaint: str) -> str:
    """What a command of Slurm's said, each thing once, on one line and without control characters."""
    lines = [
        visible(line, " ").strip().removeprefix(f"{command}: ").removeprefix("error: ").removeprefix("fatal: ").strip()
        for line in complaint.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or f"{command} said nothing"


def remedy(config: RunConfig, complaint: str) -> str | None:
    """What to do about what Slurm said; None where that is not known."""
    cluster = config.cluster
    nodes = (
        f"Asked for are {cluster.nodes} nodes with {cluster.ranks_per_node} ranks of {cluster.cpus_per_rank} CPUs and "
        f"{cluster.gpus_per_node} {_gpus(cluster)} each: `sinfo -o '%P %D %c %m %G'` shows what there is."
    )
    # In this order: the first that is found in sbatch's words is meant.
    cures = {
        "breaks a limit of its partition": (
            f"{nodes} cluster.time_limit_min is {cluster.time_limit_min}: `sinfo -o '%P %l'` shows the limits."
        ),
        "job dependency": (
            f"after={config.after}: no such job is known any more; leave it out if that job has completed."
        ),
        "account or account/partition": (
            f"cluster.account is {cluster.account} and cluster.partition {cluster.partition}: "
            "`sacctmgr show associations user=$USER format=account,partition,qos` lists yours."
        ),
        "accounting/qos policy": (
            "A limit of your account or QOS is reached, on nodes, time or jobs in the queue: `sacctmgr show qos "
            "format=name,maxtres,maxwall,maxsubmit` shows it; ask for less, or wait for others to end."
        ),
        "maxsubmit": "You have as many jobs queued as your account or QOS allows: wait for some to end.",
        "invalid partition": f"cluster.partition is {cluster.partition}: `sinfo -s` lists the partitions.",
        "partition not available": f"Partition {cluster.partition} is closed at present: see `sinfo -s`.",
        "no partition specified": "The cluster has no default partition: name one with cluster.partition.",
        "partition": f"cluster.partition is {cluster.partition}, which refuses you: see `scontrol show partition`.",
        "account": f"cluster.account is {cluster.account}: `sacctmgr show associations user=$USER` lists yours.",
        "qos": (
            f"cluster.qos is {cluster.qos} and cluster.account {cluster.account}: `sacctmgr show associations "
            "user=$USER format=account,partition,qos` lists which go together."
        ),
        "memory specification": f"cluster.memory_gb is {cluster.memory_gb}: `sinfo -o '%n %m'` shows what nodes have.",
        "time limit": f"cluster.time_limit_min is {cluster.time_limit_min}: `sinfo -o '%P %l'` shows the limits.",
        "invalid feature": f"cluster.constraint is {cluster.constraint}: `sinfo -o '%n %f'` lists what nodes have.",
        "invalid node name": f"cluster.exclude is {cluster.exclude}: `sinfo -N` lists the nodes.",
        "generic resource": f"cluster.gpu_type is {cluster.gpu_type}: `sinfo -o '%n %G'` lists the nodes' GPUs.",
        "job array": (
            "The sweep has more points than MaxArraySize in `scontrol show config` allows: split it into smaller ones."
        ),
        "reservation": "cluster.sbatch.reservation names none that is open to you: `scontrol show reservation`.",
        "license": "cluster.sbatch.licenses names none that there is: `scontrol show licenses`.",
        "node count": nodes,
        "node configuration is not available": nodes,
        "more processors requested": nodes,
        "munge": "The cluster is not up, or munge is not running here (make cluster-up starts the local cluster).",
        "unable to contact": "The Slurm controller does not answer: is SLURM_CONF right, and slurmctld up?",
        "configuration file": _NO_CONFIGURATION,
        "configuration source": _NO_CONFIGURATION,
        "timed out": "The Slurm controller is busy or down: see with `scontrol ping`, and launch again.",
        "connection refused": "The Slurm controller is down: see with `scontrol ping`, and launch again.",
    }
    lowered = complaint.lower()
    return next((each for said, each in cures.items() if said in lowered), None)


def _gpus(cluster: ClusterConfig) -> str:
    return f"GPUs of type {cluster.gpu_type}" if cluster.gpu_type else "GPUs"
