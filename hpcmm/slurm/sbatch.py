"""The one place that calls ``sbatch``; why Slurm refuses a job, and what to do about it, in one sentence each."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from hpcmm.config.schema import ClusterConfig, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import CLOCKS_S, JobIdentity, noted_jobs
from hpcmm.slurm.commands import (
    CLUSTER_NAME,
    MOST_COMPLAINT,
    SilentError,
    ask,
    clusters_asked,
    job_variables,
    on_cluster,
    outside_of_jobs,
    run_command,
)
from hpcmm.slurm.jobs import Job, find_jobs, is_same_job, jobs_of_scripts, rows_of, who_has
from hpcmm.text import visible

_TIMEOUT_S = 120

_CANNOT_START = {
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
_USUAL_SCRIPT_BYTES = 4 * 1024**2
_USUAL_OPTION_CHARACTERS = 1024
_OPTION = re.compile(r"#SBATCH --([a-z-]+)=(.*)")
_OF_THE_PATH = frozenset({"output", "array"})
_KEYS = {
    "job-name": "name",
    "dependency": "after",
    **{name: f"cluster.{name}" for name in ("partition", "account", "qos", "constraint", "exclude")},
}
"""Configuration keys of options that have one of their own."""
_TOO_LONG = re.compile("too long|too large|max_script_size", re.IGNORECASE)
_CLUSTERS = "clusters"
"""sbatch's option, which an ``#SBATCH`` line may hold too."""
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


_ACCEPTED = re.compile(rf"Submitted batch job ([1-9][0-9]{{0,9}})\b(?: on cluster ({CLUSTER_NAME}))?(?! on cluster)")
_PARSABLE = re.compile(rf"([1-9][0-9]{{0,9}})(?:;({CLUSTER_NAME}))?")
_OF_A_JOB = ("SLURM_JOB_ID", "SLURM_JOBID")
_SET_BY_SLURM = re.compile(r"SRUN_DEBUG$|SRUN_CPUS_PER_TASK$|SBATCH_(CPU|MEM)_BIND(_|$)")
"""Variables that srun and sbatch set by themselves within a job."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class RefusedError(HpcmmError):
    """Nothing was queued, for certain."""


class UncertainError(HpcmmError):
    """sbatch's answer was lost: the job may be queued all the same."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}, so the job may or may not be queued; {remedy}")
        self.why = why


@dataclass(frozen=True, slots=True)
class Accepted:
    """What sbatch says of a job that it took."""

    job_id: str
    cluster: str = ""
    """The cluster that has it; empty if sbatch did not say."""


def sbatch(
    config: RunConfig, script: Path, *options: str, without: Sequence[str] = (), lock: int | None = None
) -> Accepted:
    """Submit ``script``. Raises RefusedError, with a remedy, when Slurm refuses it, and UncertainError if the job may
    be queued all the same.

    The job is what the script says: variables of the user's shell that would change it do not reach sbatch, nor do
    those in ``without``. ``lock``: a descriptor that sbatch holds too. What it locks stays locked until sbatch has its
    answer, also if this process is killed before.
    """
    check_slurm_is_here()
    _say_what_is_ignored(job_variables(os.environ))
    environ = {name: value for name, value in outside_of_jobs(os.environ).items() if name not in without}
    if _CLUSTERS in config.cluster.sbatch and "SLURM_CLUSTERS" not in config.cluster.submit_environment:
        environ.pop("SLURM_CLUSTERS", None)  # it would outweigh the script's own line
    began_s = time.time()
    try:
        command = ["sbatch", *options, str(script)]
        done = run_command(command, environ, _TIMEOUT_S, process_group=0, keep_open=() if lock is None else (lock,))
    except subprocess.TimeoutExpired:
        return _accepted_unheard(script, f"sbatch gave no answer within {_TIMEOUT_S} s", began_s)
    except SilentError as error:
        return _accepted_unheard(script, error.reason, began_s)
    except OSError as error:
        raise RefusedError(f"sbatch cannot be run ({error.strerror}): see `which sbatch`.") from error
    complaint, answer = done.stderr, done.stdout
    if done.returncode != 0 and _is_certain(done.returncode, complaint, answer):
        raise RefusedError(refusal(config, complaint, script))
    if complaint.strip() and done.returncode == 0:
        print(visible(complaint.strip(), " "), file=sys.stderr)
    accepted = accepted_by(answer)
    if accepted is None or done.returncode != 0:
        if done.returncode < 0:
            why = f"sbatch was ended by signal {-done.returncode}"
        elif done.returncode > 0:
            why = f"sbatch failed ({on_one_line('sbatch', complaint)})"
        else:
            said = visible(answer.strip().splitlines()[0], " ") if answer.strip() else "nothing was said"
            why = f"sbatch gave no job id ({said})"
        return _accepted_unheard(script, why, began_s)
    return accepted


def _accepted_unheard(script: Path, why: str, began_s: float) -> Accepted:
    """The job that Slurm took all the same, though its answer was lost. Raises UncertainError if it shows none."""
    noted = noted_jobs(RunDir(script.parent))
    try:
        rows = [
            row
            for row in jobs_of_scripts([str(script)])
            if row.number not in noted and (row.submitted_unix_s or began_s) > began_s - CLOCKS_S
        ]
        numbers = list(dict.fromkeys(row.number for row in rows))
        if len(numbers) == 1:
            print(f"hpcmm: {why}, but squeue shows the job, {numbers[0]}.", file=sys.stderr)
            return Accepted(numbers[0], rows[0].cluster if "," not in rows[0].cluster else "")
        shown = f"squeue shows {', '.join(numbers)}" if numbers else "squeue does not show it (yet)"
    except HpcmmError as error:
        shown = f"squeue cannot tell: {error}"
    look = f"python -m hpcmm.jobs status {shlex.quote(str(script.parent))}, which notes the job if Slurm has it"
    raise UncertainError(why, f"{shown.rstrip('.')}. Before you launch again, see with {look}.")


def accepted_by(answer: str) -> Accepted | None:
    """The job that sbatch's output tells of, among a site's banner lines; None if it tells of no job, or of several.

    That is ``Submitted batch job 85``, also with ``on cluster NAME``, else a line that is ``85`` or ``85;NAME``.
    """
    lines = [_COLOURS.sub("", line).strip() for line in answer.splitlines()]
    for match in (_ACCEPTED.match, _ACCEPTED.search, _PARSABLE.fullmatch):
        found = {Accepted(each[1], each[2] or "") for each in map(match, lines) if each is not None}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def enter_cluster(config: RunConfig) -> None:
    """From here on, all that asks Slurm asks where ``config`` submits: by its environment and its clusters."""
    os.environ.update(config.cluster.submit_environment)
    if _CLUSTERS in config.cluster.sbatch and "SLURM_CLUSTERS" not in config.cluster.submit_environment:
        os.environ["SLURM_CLUSTERS"] = config.cluster.sbatch[_CLUSTERS]


def submitted(
    config: RunConfig, script: Path, name: str, *options: str, without: Sequence[str] = (), lock: int | None = None
) -> JobIdentity:
    """As :func:`sbatch`: submit ``script``, and give what is known of its job then."""
    began_s = time.time()
    accepted = sbatch(config, script, *options, without=without, lock=lock)
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # as in some containers
        user = ""
    cluster = accepted.cluster or clusters_asked(os.environ)
    return JobIdentity(accepted.job_id, cluster, user, name, (str(script),), began_s, uid=os.geteuid())


def _say_what_is_ignored(variables: Sequence[str]) -> None:
    """Of those that a user sets; what an outer job left is nobody's wish."""
    is_within_a_job = any(name in variables for name in _OF_A_JOB)
    options = [
        name
        for name in variables
        if name.startswith(("SBATCH_", "SRUN_")) and not (is_within_a_job and _SET_BY_SLURM.match(name))
    ]
    if options:
        named = visible(", ".join(options))
        print(
            f"hpcmm: {named} of your environment {'is' if len(options) == 1 else 'are'} not used, for the "
            "configuration alone decides: set keys of cluster, such as cluster.sbatch.",
            file=sys.stderr,
        )


def check_slurm_is_here() -> None:
    """Raises RefusedError without Slurm's commands, or its configuration."""
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if missing:
        raise RefusedError(
            f"{' and '.join(missing)} not found: launch on a Slurm login node, or run here with cluster=local."
        )
    check_slurm_conf()


def check_slurm_conf() -> None:
    """Raises RefusedError where SLURM_CONF names no file, for which Slurm's commands would wait a minute."""
    configuration = os.environ.get("SLURM_CONF")
    if configuration and not Path(configuration).is_file():
        raise RefusedError(
            f"SLURM_CONF is {configuration}, which is not a file: is the cluster up (make cluster-up starts the local)?"
        )


def most_array_tasks() -> int | None:
    """How many tasks an array may have here, which are numbered from 0; None if the controller does not tell.

    Raises RefusedError without Slurm's commands, or if the cluster takes no arrays.
    """
    check_slurm_is_here()
    try:
        shown = ask("scontrol", "show", "config")
    except HpcmmError:
        return None  # sbatch has its own word on that
    for line in shown.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdecimal():
            if int(value) == 0:
                raise RefusedError("This cluster takes no job arrays (MaxArraySize is 0): launch one run at a time.")
            return int(value)  # the highest number of a task is one less
    return None


def as_slurm_has_it(known: JobIdentity) -> tuple[JobIdentity, Job | None]:
    """A job that was accepted just now: what identifies it, with Slurm's own words of that, and the job itself.

    None if Slurm does not show it, and a line says so if it shows another job with the number.
    """
    asked = known
    try:
        rows = find_jobs([asked], on_cluster(asked.cluster, os.environ)).jobs
    except HpcmmError as error:
        if not (isinstance(error, SilentError) and error.lasting) or asked.cluster == clusters_asked(os.environ):
            return known, None  # it is accepted, which is what counts
        # Nothing here knows the cluster that sbatch named: a site's own sbatch may name it otherwise.
        asked = replace(known, cluster="")
        rows = _asked_here(asked)
    rows = [row for row in rows if row.source == "squeue"]  # accounting may still show an older job
    shown = (rows_of(asked, rows) or rows_of(asked.job_id, rows))[:1]
    if not shown:
        return known, None
    (job,) = shown
    script = PurePosixPath(known.scripts[0])
    copied = job.command.startswith("/") and PurePosixPath(job.command).name != script.name
    if not is_same_job(asked, job) and not (copied and is_same_job(replace(asked, scripts=()), job)):
        print(
            f"hpcmm: sbatch accepted job {known.job_id}, but squeue shows another job by that number "
            f"({who_has(job)}): is yours on another cluster? Name it in cluster.sbatch.clusters.",
            file=sys.stderr,
        )
        return known, None
    known = asked
    scripts = (*known.scripts, job.command) if copied else known.scripts
    cluster = known.cluster if known.cluster and "," not in known.cluster else job.cluster
    return replace(known, cluster=cluster, scripts=scripts, slurm_submitted_unix_s=job.submitted_unix_s), job


def _asked_here(known: JobIdentity) -> list[Job]:
    try:
        return find_jobs([known]).jobs
    except HpcmmError:
        return []


def warn_where_it_cannot_start(config: RunConfig, job: Job) -> None:
    """Say so when Slurm has accepted a job that breaks a limit: many sites let such a job wait for ever."""
    job_id = job.job_id.split("_")[0]
    if job.state == "PENDING" and job.reason in _CANNOT_START:
        print(
            f"hpcmm: job {job_id} is queued but cannot start as it is ({job.reason}). "
            f"{_cannot_start(config, job.reason)} To take it back: python -m hpcmm.jobs cancel {job_id}",
            file=sys.stderr,
        )


def _cannot_start(config: RunConfig, reason: str) -> str:
    """What to do about a job that waits for one of ``_CANNOT_START``."""
    return remedy(config, _CANNOT_START[reason]) or _UNKNOWN


def _is_certain(returncode: int, complaint: str, answer: str) -> bool:
    """Whether sbatch's failure leaves no doubt that nothing is queued: it said why, and had an answer for that."""
    lowered = complaint.lower()
    return (
        returncode > 0
        and bool(complaint.strip())
        and "submitted batch job" not in answer.lower()
        and not any(words in lowered for words in _UNCERTAIN)
    )


def refusal(config: RunConfig, complaint: str, script: Path | None = None) -> str:
    """sbatch's own words, on one line and without control characters, and the remedy."""
    said = on_one_line("sbatch", complaint)
    long = _too_long(script) if script is not None and _TOO_LONG.search(said) else None
    return f"Slurm refused the job ({said}). {long or remedy(config, said) or _UNKNOWN}"


def _too_long(script: Path) -> str:
    """Slurm has one sentence for a script that is too large, and for a path or another value that is too long."""
    size_bytes = script.stat().st_size
    if size_bytes > _USUAL_SCRIPT_BYTES // 2:
        return (
            f"The job's script has {size_bytes / 1e6:.1f} MB; Slurm takes {_USUAL_SCRIPT_BYTES / 1e6:.0f} MB unless "
            "max_script_size in `scontrol show config` says otherwise: put long cluster.setup lines and long texts in "
            "cluster.environment into files, and name these."
        )
    with script.open(encoding="utf-8", errors="replace") as file:
        options = [match for match in map(_OPTION.match, file) if match is not None and match[1] not in _OF_THE_PATH]
    longest = max(options, key=lambda option: len(option[2]), default=None)
    if longest is not None and len(longest[2]) > max(_USUAL_OPTION_CHARACTERS, len(str(script))):
        name = longest[1]
        return (
            f"The job's option --{name} has {len(longest[2])} characters, which Slurm may not take: shorten it "
            f"({_KEYS.get(name, f'cluster.sbatch.{name}')})."
        )
    return f"{script.parent} is too long for Slurm: set runs_root to a shorter path."


def on_one_line(command: str, complaint: str) -> str:
    """What a command of Slurm's said, each thing once, on one line and without control characters."""
    lines = [
        visible(line, " ").strip().removeprefix(f"{command}: ").removeprefix("error: ").removeprefix("fatal: ").strip()
        for line in complaint[:MOST_COMPLAINT].splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or f"{command} said nothing"


def remedy(config: RunConfig, complaint: str) -> str | None:
    """What to do about what Slurm said; None if that is not known."""
    cluster = config.cluster
    nodes = (
        f"Asked for are {cluster.nodes} nodes with {cluster.ranks_per_node} ranks of {cluster.cpus_per_rank} CPUs and "
        f"{cluster.gpus_per_node} {_gpus(cluster)} each: `sinfo -o '%P %D %c %m %G'` shows what there is."
    )
    # In this order: the first that is found in sbatch's words is meant.
    remedies = {
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
        "no cluster '": "`sacctmgr show clusters format=cluster` lists what cluster.sbatch.clusters may name.",
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
            "An array of the sweep has more tasks than MaxArraySize in `scontrol show config` allows: launch it anew."
        ),
        **_of_the_script(cluster),
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
    return next((each for said, each in remedies.items() if said in lowered), None)


def _of_the_script(cluster: ClusterConfig) -> dict[str, str]:
    return {
        "begin and deadline": (
            "cluster.sbatch.begin and cluster.sbatch.deadline leave too little time for cluster.time_limit_min, "
            f"which is {cluster.time_limit_min}."
        ),
        "dos line breaks": f"slurm/{cluster.template} has the line ends of Windows: convert it with dos2unix.",
        "not look like a batch script": f"slurm/{cluster.template} must begin with a line such as #!/bin/bash.",
    }


def _gpus(cluster: ClusterConfig) -> str:
    return f"GPUs of type {cluster.gpu_type}" if cluster.gpu_type else "GPUs"
