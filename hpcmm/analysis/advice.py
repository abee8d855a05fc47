"""What to try, in words, by the kind of a finding: of a run none of whose keys is known to help.

Most runs train with PyTorch. A report also tells whether its workers are no Python programs at all.
"""

from __future__ import annotations

import re

from hpcmm.analysis import copies
from hpcmm.analysis.findings import Finding

PIPELINE = {
    "stage": "set the split points, or PipelineModule(partition_method=...), by measured cost",
    "bubble": "more micro-batches a step, or an interleaved schedule (several smaller stages a rank)",
}

EVEN_EXPERTS = (
    "an auxiliary loss that evens out the router, or more weight on it (router_aux_loss_coef); a capacity factor, "
    "above which tokens are dropped; or other ranks for experts that get many tokens"
)
_FEWER_GRADIENTS = "accumulate gradients over more micro-batches (no_sync), or compress them (bf16_compress_hook)"
_LARGER_BUCKETS = "fewer, larger buckets: DistributedDataParallel(bucket_cap_mb=100), DeepSpeed's reduce_bucket_size"
_FUSE = "fuse small collectives: stack their values into one tensor, and exchange losses and metrics only when logged"
_PARAMETERS = "keep them gathered for backward (reshard_after_forward=False), prefetch, or shard within a node (HSDP)"
_WRAP = "wrap larger units with fully_shard, so that fewer and larger gathers run, and prefetch the next one"
_ACTIVATIONS = "keep the tensor-parallel group within a node; sequence parallel; async tensor parallel (torch.compile)"
_SENDS = "larger micro-batches send less often; keep neighbouring stages within a node or on its fastest links"
_TOKENS = "keep these groups within a node, or overlap the exchange with computation"
_EXPERTS = "keep each expert group within a node, or overlap the exchange with computation that needs no expert"
_PARTS = "keep each sequence group within a node; fewer parts; ring attention overlaps its sends with computation"
_BUFFERS = "send no buffers before each forward pass: DistributedDataParallel(broadcast_buffers=False)"
_ANY = "if these are gradients, accumulate them over more micro-batches before they are exchanged, or compress them"
TRANSFER = {
    ("", ""): _ANY,
    ("", "latency"): "fewer, larger messages: fuse small collectives, or use larger buckets if these are gradients",
    ("", "bandwidth"): _ANY,
    **{("gradients", bound): _FEWER_GRADIENTS for bound in ("", "bandwidth")},
    ("gradients", "latency"): _LARGER_BUCKETS,
    **{("sharded parameters", bound): _PARAMETERS for bound in ("", "bandwidth")},
    ("sharded parameters", "latency"): _WRAP,
    **{("activations", bound): _ACTIVATIONS for bound in ("", "latency", "bandwidth")},
    **{("pipeline sends", bound): _SENDS for bound in ("", "latency")},
    ("pipeline sends", "bandwidth"): "send activations in bf16, and keep neighbouring stages within a node",
    **{("tokens of experts or sequence parts", bound): _TOKENS for bound in ("", "latency", "bandwidth")},
    **{("tokens of experts", bound): _EXPERTS for bound in ("", "latency", "bandwidth")},
    **{("sequence parts", bound): _PARTS for bound in ("", "latency", "bandwidth")},
    **{("module buffers", bound): _BUFFERS for bound in ("", "latency", "bandwidth")},
    **{("small messages", bound): _FUSE for bound in ("", "latency", "bandwidth")},
}
"""By what moves and what bounds it."""
_FEWER_EXCHANGES = (
    "a larger train_micro_batch_size_per_gpu, or ZeRO stage 1 with more gradient_accumulation_steps (from stage 2 on "
    "each micro-batch has an exchange)"
)
_STAYS_GATHERED = (
    "let more stay gathered (stage3_max_live_parameters, stage3_max_reuse_distance), gather within a node "
    "(zero_hpz_partition_size), or ZeRO stage 2 if the model fits"
)
DEEPSPEED = {
    ("gradients", ""): _FEWER_EXCHANGES,
    ("gradients", "bandwidth"): _FEWER_EXCHANGES,
    ("gradients", "latency"): "fewer, larger buckets: DeepSpeed's reduce_bucket_size and allgather_bucket_size",
    ("sharded parameters", ""): _STAYS_GATHERED,
    ("sharded parameters", "bandwidth"): _STAYS_GATHERED,
    ("sharded parameters", "latency"): "larger stage3_prefetch_bucket_size and stage3_param_persistence_threshold",
}
"""In the keys of its configuration, of a script that trains with DeepSpeed itself."""
IN_NODE = {
    "sharded parameters": "keep them gathered for backward (reshard_after_forward=False), or prefetch the next ones",
    "activations": "sequence parallel; async tensor parallel (torch.compile); leave outputs sharded (loss_parallel)",
    "tokens of experts or sequence parts": "overlap the exchange with computation",
    "tokens of experts": "overlap the exchange with computation that needs no expert, or send in bf16",
    "sequence parts": "fewer parts of the sequence, or ring attention, which overlaps its sends with computation",
    "pipeline sends": "larger micro-batches send less often; activations in bf16",
}
"""Of groups that lie within a node already, by what moves."""
SINGLE = {
    "gradients": "exchange them for more work: a larger batch, or several micro-batches for each exchange (no_sync)",
    "small messages": "a larger batch, so that fewer steps wait for it; a loss or metric only when it is logged",
}
"""Of one message a step that latency bounds, by what moves."""

GPU = {
    "gpu_host": "a larger micro-batch, or fewer launches: torch.compile(model, mode='reduce-overhead')",
    "gpu_sync": "no .item(), .cpu(), print or torch.cuda.synchronize() in the step; copies with non_blocking=True",
    "gpu_order": "let streams wait for one another only where they must; fewer, larger kernels: torch.compile(model)",
    "gpu_copy": "copies beside the computation, on a stream of their own (non_blocking=True), and fewer, larger ones",
    "gpu_os": "ranges around the parts of the loop (torch.cuda.nvtx.range) tell what the host does in these calls",
    "gpu_unknown": "a trace that has the calls of CUDA: nsys profile --trace=cuda,nvtx,osrt",
    "gpu_code": "ranges around parts of a loop, a trace of OS calls (nsys profile --trace=cuda,nvtx,osrt), or py-spy",
    "gpu_mpi": "start communication early and wait for it late (MPI_Isend, MPI_Iallreduce), or NCCL on a stream",
    "gpu_cuda": "once, before the loop: allocations, pinned buffers, loading of modules (CUDA_MODULE_LOADING=EAGER)",
    "gpu_gap": "leave it out of the capture, to see more of the loop: nsys profile --capture-range=cudaProfilerApi",
    "gpu_set": "set less memory, and once: gradients by zero_grad(set_to_none=True), buffers that are kept rather than "
    "made new by torch.zeros in each step, torch.empty if all of them is written",
    "gpu_comm": "exchange beside the computation (async tensor parallel, a stream of its own), in fewer, larger "
    "kernels; if comm_s in table gpu is short on one rank alone, the others wait for that rank",
    "gpu_wait": "give each GPU as much to do as the others, by the cost of batches, experts or layers",
}
OS = (
    (re.compile(r"sleep"), "no sleep in the loop: wait for the event itself"),
    (re.compile(r"^(f|p)?(write|puts|flush|sync|datasync)"), "print, log or save less often, or from another thread"),
    (re.compile(r"^(wait|fork|vfork|posix_spawn|exec|system|popen)"), "start no child process within the loop"),
    (
        re.compile(r"^(p?poll|p?select|epoll|recv|accept|connect|send)"),
        "the host waits for another process or the network: if that is its data loader, more workers and prefetching",
    ),
    (re.compile(r"pthread_|sem_|futex"), "the host waits for another thread of its own: ranges there tell for what"),
    (re.compile(r"mmap|munmap|madvise|brk"), "allocate host memory once, before the loop"),
)
"""By the function in which the host is."""


MORE_CORES = "sbatch --cpus-per-task=N --hint=nomultithread ... with more cores a rank"
MORE_CORES_WITHOUT_SLURM = (
    "cores of its own for each rank (taskset -c, numactl --physcpubind), and no more threads than these: "
    "OMP_NUM_THREADS=N"
)
WITHOUT_PYTHON = "without Python"
"""Stands for a framework, of a report whose workers are no Python programs."""
_MORE_A_LAUNCH = "more work a launch: larger problems, fewer and larger kernels, or CUDA graphs"
_RANGES = "ranges around the parts of the loop (nvtxRangePush, nvtxRangePop)"
_READ_AHEAD = "read the next input ahead of time, in a thread of its own"
_WITHOUT_PYTHON = {
    "data": _READ_AHEAD,
    "between": f"write and log less often; {_RANGES} tell what it is",
    "other": f"{_RANGES} tell which part it is",
    "solo": "share it out over all ranks, do it less often, or in a thread or job of its own",
    "transfer": "fewer, larger messages, less often, or beside the computation: on a stream, by calls that do not wait",
    "unseen": "capture each rank: mpirun nsys profile -o report_%q{OMPI_COMM_WORLD_RANK} ./program",
    "gpu_host": _MORE_A_LAUNCH,
    "gpu_sync": "fewer cudaDeviceSynchronize and blocking copies in the loop: events, streams and cudaMemcpyAsync",
    "gpu_order": "let streams wait for one another only where they must; fewer, larger kernels, or CUDA graphs",
    "gpu_code": f"{_RANGES}, or samples of the CPU (nsys profile --sample=process-tree), tell what it is",
    "gpu_set": "set less memory, and once; none that is written as a whole before it is read",
    "gpu_comm": "exchange beside the computation, on a stream of its own, in fewer, larger kernels; if comm_s in table "
    "gpu is short on one rank alone, the others wait for that rank",
    "gpu_wait": "give each GPU as much to do as the others, by the cost of its part",
    "gpu_data": _READ_AHEAD,
    "host_sleep": "look for a sleep, or a library that polls, in the loop: wait for the event",
    "host_read": _READ_AHEAD,
    "host_open": "open fewer files in the loop, or ahead of time in a thread of its own",
    "host_pipe": "see in osrt.csv which calls wait for the other process, and let that work ahead",
    "host_code": f"{_RANGES}, or samples of the CPU (nsys profile --sample=process-tree), tell what it runs",
    "host_other": "see osrt.csv for these calls; samples of the CPU (nsys profile --sample=process-tree) tell the rest",
    "host_wait": "who waits for whom, a trace of MPI tells: nsys profile --trace=mpi,nvtx,osrt",
}
_COPIES_WITHOUT_PYTHON = {
    "offload": "keep more on the GPU, or move it beside the computation (cudaMemcpyAsync on a stream of its own)",
    "host to device, pageable": "pinned memory (cudaMallocHost), and cudaMemcpyAsync beside the computation",
    "host to device, pinned": "copies beside the computation: cudaMemcpyAsync on a stream of their own",
    "device to host, pageable": "fewer copies to the host, into pinned memory (cudaMallocHost), on their own stream",
    "device to host, pinned": "fewer copies to the host, on a stream of their own",
    "device to device, device": "fewer copies on the GPU: exchange pointers, or let a kernel read where the data lie",
}


_UNSEEN_BY_SLURM = ", or srun nsys profile -o report_%q{SLURM_PROCID} ./program"


def without_python(finding: Finding, *, has_slurm: bool) -> str:
    """What to try in a program without Python; empty if that is no other than in any."""
    if finding.kind == "unseen" and has_slurm:
        return _WITHOUT_PYTHON["unseen"] + _UNSEEN_BY_SLURM
    if finding.kind == "gpu_copy":
        usual = "" if finding.moves in copies.ADVICE else "fewer, larger copies, on a stream beside the computation"
        return _COPIES_WITHOUT_PYTHON.get(finding.moves, usual)
    if finding.kind == "gpu_os":
        return next((told for function, told in OS if function.search(finding.function)), f"{_RANGES} tell for what")
    return "" if finding.node and finding.kind == "transfer" else _WITHOUT_PYTHON.get(finding.kind, "")
