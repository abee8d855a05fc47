"""What to do about each kind of failure."""

from __future__ import annotations

from hpcmm.jobs.first_failure import Verdict
from hpcmm.node.classify import Kind

_ADVICE = {
    Kind.out_of_memory: "Use less: a smaller train.micro_batch_size with more train.gradient_accumulation_steps, a "
    "higher parallel.zero_stage, fewer data.num_workers; or ask for more with cluster.memory_gb.",
    Kind.gpu_error: "Run `nvidia-smi -q` on the node, or `python -m hpcmm.doctor`; tell the site if errors are counted "
    "there.",
    Kind.disk_full: "Free space where the message says, or set runs_root and cluster.cache_dir to another file system; "
    "`python -m hpcmm.doctor` shows what is free.",
    Kind.rendezvous: "See whether all ranks started (their logs), whether the first node's name resolves on the others "
    "and its ports are open: `python -m hpcmm.doctor` checks both.",
    Kind.collective_timeout: "See what the named rank did at the place shown. If all ranks only needed longer, raise "
    "parallel.collective_timeout_s.",
    Kind.peer_lost: "The lost rank left no record: see its log's end and Slurm's word of its node.",
    Kind.import_failed: "Install what is missing into the Python that the job uses, or load its module with "
    "cluster.modules; `python -m hpcmm.doctor` compares the nodes' packages.",
    Kind.data: "See that the file or folder in the message exists and can be read on the named node: data.root names "
    "the data set's folder.",
    Kind.exception: "The program itself raised this: its last lines are shown, the rest is in the rank's log.",
    Kind.killed: "Something outside of the job sent SIGKILL: most often the kernel, when a node's memory is full (its "
    "administrator sees it in dmesg), else a person. Ask for memory with cluster.memory_gb.",
    Kind.crashed: "Native code crashed: the stacks file in the failures folder shows where; compare package versions "
    "with `python -m hpcmm.doctor`.",
    Kind.node_failure: "Run again without the node, and tell the site.",
    Kind.time_limit: "Raise cluster.time_limit_min, or go on from the last checkpoint.",
    Kind.preempted: "Submit again: it goes on from the last checkpoint where one was saved.",
    Kind.cancelled: "Somebody cancelled it; submit it again if that was a mistake.",
    Kind.unknown: "Read the logs' last lines: python -m hpcmm.jobs logs JOB",
}


def advice(verdict: Verdict, job_id: str, excluded: str = "") -> list[str]:
    """Sentences, and for bad nodes the line that leaves them out. ``excluded``: nodes that the run left out already."""
    lines = [_ADVICE[verdict.kind].replace("JOB", job_id)]
    if verdict.bad_nodes:
        nodes = ",".join([*([excluded] if excluded else []), *verdict.bad_nodes])
        lines.append(f"Leave it out: 'cluster.exclude=\"{nodes}\"' for hpcmm.launch, --exclude={nodes} for sbatch.")
    return lines
