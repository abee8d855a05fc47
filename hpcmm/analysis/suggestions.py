"""What to try against each kind of finding.

A suggestion is an override of this project's configuration, or a shell line; ``docs/bottlenecks.md`` explains each
under the name of its kind. Of a run that hpcmm did not launch nothing is known but its reports, so that its suggestions
are shell lines, or advice in words. If hpcmm launched a script of the user's, the keys of the cluster are right, and
only these. If it spread the model by a recipe, the keys of the recipe are what the user can change, and nothing else.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hpcmm.analysis import copies, gpu_findings, host_calls
from hpcmm.analysis.findings import Finding


def suggest(  # noqa: PLR0911 -- one answer a kind
    finding: Finding, config: Mapping[str, Any], cpus: int = 0, framework: str = ""
) -> str:
    """One override or command for ``finding``; ``cpus``: of the smallest node, 0 if that is not known.

    ``framework``: that a script of the user's imports, such as ``deepspeed``; empty if that is not known.

    ``config`` is what decides how the run's ranks ran: its configuration, of it the section ``cluster`` alone where it
    ran a script of the user's, or empty if there is none.
    """
    if finding.kind == "gpu_data":
        return suggest(replace(finding, kind="data"), config, cpus, framework)
    if finding.kind in host_calls.ADVICE:
        return host_calls.ADVICE[finding.kind]
    trains = bool(config) and set(config) != {"cluster"}
    ours = {"", "gradients"} | ({"sharded parameters"} if _zero_stage(config) > 2 else set())
    if finding.kind in {"stall", "subprocess", "interruption"} or (finding.kind == "transfer" and finding.node):
        return _shell(finding)
    if finding.kind == "unseen":
        return _capture_all(config)
    if finding.kind == "few":
        return "capture more steps, ten or more: they tell a rank that is always late from chance"
    if finding.is_slow:
        return _find_the_link(config)
    if trains and (own := _key_of_recipe(finding, config)):
        return own
    if finding.kind in _PIPELINE_ADVICE or (finding.kind == "transfer" and not (trains and finding.moves in ours)):
        return _advice_for_what_moves(finding, framework)
    if finding.kind == "experts":
        return _EVEN_EXPERTS
    if finding.kind in _GPU_ADVICE and not (trains and finding.kind in _HELPED_BY_LARGER_BATCHES):
        return _advice_for_gpus(finding, config)
    if finding.kind == "compute" and finding.gpu_excess in _OF_EXCESS:
        return _GPU_ADVICE[_OF_EXCESS[finding.gpu_excess]]
    if finding.kind == "compute" and _has_no_other_node(finding, config):
        return _look_at_the_node(finding, config)
    scheduled = finding.kind == "imbalance" or (finding.kind == "compute" and finding.node != "")
    shared = _shared_cpus(config, cpus) if finding.kind == "imbalance" else ""
    return shared or (_override(finding, config) if trains or (config and scheduled) else _advice(finding))


def _capture_all(config: Mapping[str, Any]) -> str:
    """How to have a report of each rank."""
    if not config:
        return (
            "capture each rank: srun nsys profile -o report_%q{SLURM_PROCID} python ..., or "
            "torchrun --no-python nsys profile -o report_%q{RANK} python ..."
        )
    if _text(config, "profile", "ranks") == "all":
        return "see in coverage.csv why these ranks left no report, and run again"
    return "profile.ranks=all"


def _key_of_recipe(finding: Finding, config: Mapping[str, Any]) -> str:  # noqa: PLR0911 -- one answer a kind
    """What to set, if the finding is of an axis that a recipe has cut, or of hpcmm's own small messages; else empty."""
    if finding.kind == "transfer" and finding.moves == "small messages":
        # Counts of tokens, norms and the agreement to go on are hpcmm's own, and one each a step.
        return _twice_the_micro_batch(config)
    axis = _AXIS_OF.get(finding.kind) or (_AXIS_OF_MOVES.get(finding.moves) if finding.kind == "transfer" else None)
    ranks = _ranks_along(config, axis) if axis else 1
    if axis is None or ranks < 2:
        return ""
    if finding.kind == "stage":
        return f"{finding.moves}: parallel.pipeline_layers=[...], the layers of each stage"
    if finding.kind == "bubble":
        return _more_micro_batches(config)
    if finding.kind == "experts":
        return f"fewer ranks for the experts, so that busy ones share a rank with others: {_fewer(axis, ranks)}"
    if not finding.is_in_node and (nodes := _nodes_around(axis, config)):
        return f"{nodes}, so that each {axis} group lies within a node"
    if finding.bound == "latency":
        return _twice_the_micro_batch(config)
    if _text(config, "parallel", "precision") == "fp32":
        return "parallel.precision=bf16, which halves the bytes"
    if axis == "sequence" and _text(config, "parallel", "attention") == "ulysses":
        return "parallel.attention=ring, which sends while it computes"
    return _fewer(axis, ranks)


_AXIS_OF = {"stage": "pipeline", "bubble": "pipeline", "experts": "expert"}
_AXIS_OF_MOVES = {
    "activations": "tensor",
    "sequence parts": "sequence",
    "tokens of experts": "expert",
    "pipeline sends": "pipeline",
}
"""The axis of the mesh along which it moves."""


def _ranks_along(config: Mapping[str, Any], axis: str) -> int:
    parallel = config.get("parallel")
    return _number(parallel, "mesh", axis, 1) if isinstance(parallel, Mapping) else 1


def _fewer(axis: str, ranks: int) -> str:
    return f"parallel.mesh.{axis}={ranks // 2}"


def _more_micro_batches(config: Mapping[str, Any]) -> str:
    """Twice as many, of half the examples if they can be halved, which keeps the global batch."""
    size, rounds = (_number(config, "train", key, 1) for key in ("micro_batch_size", "gradient_accumulation_steps"))
    smaller = f"train.micro_batch_size={size // 2} " if size % 2 == 0 else ""
    return f"{smaller}train.gradient_accumulation_steps={2 * max(1, rounds)}"


def _nodes_around(axis: str, config: Mapping[str, Any]) -> str:
    """The same ranks on fewer nodes, each of which has whole groups along ``axis``; empty if it does not come out."""
    if axis == "pipeline":  # stages lie farthest apart by intention: they send the least
        return ""
    inner = {"tensor": (), "sequence": ("tensor",), "expert": ("tensor", "sequence")}[axis]
    across = math.prod(_ranks_along(config, each) for each in (axis, *inner))
    nodes, ranks = (_number(config, "cluster", key, 1) for key in ("nodes", "ranks_per_node"))
    together = math.lcm(across, max(1, ranks))
    if together == ranks or (nodes * ranks) % together:
        return ""
    return f"cluster.nodes={nodes * ranks // together} cluster.ranks_per_node={together}"


def _shared_cpus(config: Mapping[str, Any], cpus: int) -> str:
    """What to do if a node has no CPU left for its ranks; empty if it has, or that is not known."""
    ranks, each = (_number(config, "cluster", key, 1) for key in ("ranks_per_node", "cpus_per_rank"))
    if not (config and cpus) or ranks * (each + 1) <= cpus:
        return ""
    if ranks == 1:
        return f"nodes with more CPUs, or fewer processes on each: all of them share the {cpus} CPUs of a node"
    return f"fewer ranks a node, or nodes with more CPUs: {ranks} ranks share the {cpus} CPUs of a node"


def _advice_for_what_moves(finding: Finding, framework: str) -> str:
    if finding.kind in _PIPELINE_ADVICE:
        return _PIPELINE_ADVICE[finding.kind] if not finding.moves else f"{finding.moves}: {_PIPELINE_ADVICE['stage']}"
    if framework == "deepspeed" and (settings := _DEEPSPEED_ADVICE.get((finding.moves, finding.bound))):
        return settings
    usual = _TRANSFER_ADVICE[finding.moves, finding.bound]
    if finding.is_in_node and "within a node" in usual:
        return _IN_NODE_ADVICE[finding.moves]
    return _SINGLE_ADVICE.get(finding.moves, usual) if finding.is_single else usual


def _has_no_other_node(finding: Finding, config: Mapping[str, Any]) -> bool:
    """Whether no other node can stand in for the finding's, or which one that is is not known."""
    if not config:
        return finding.is_only_node or not finding.node
    return finding.node != "" and _number(config, "cluster", "nodes", 0) == 1 and _is_local(config)


def _look_at_the_node(finding: Finding, config: Mapping[str, Any]) -> str:
    """What to look at on the only node of a run, that no other node can stand in for."""
    where = "this machine" if _is_local(config) else finding.node or "its node"
    if finding.gpu_excess == gpu_findings.COMPUTES:
        return f"on {where}: nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE, for a GPU that is slowed down"
    return f"see what else uses the cores of {where}: top"


def _is_local(config: Mapping[str, Any]) -> bool:
    """Whether the run had this machine alone, whose node nothing can exclude."""
    cluster = config.get("cluster")
    return isinstance(cluster, Mapping) and cluster.get("executor") == "local"


def _shell(finding: Finding) -> str:
    match finding.kind:
        case "stall":
            return f"srun -w {shlex.quote(finding.node)} dmesg -T | grep -iE 'throttl|oom|hung|link'"
        case "interruption":
            return "srun --ntasks-per-node=1 sh -c 'hostname; ip -s link; dmesg -T | grep -i link | tail'"
        case "transfer":
            return f"srun -w {shlex.quote(finding.node)} sh -c 'ip -s link; tc -s qdisc'"
        case _:
            return "grep 'within step' analysis/waitpid.csv"


def _find_the_link(config: Mapping[str, Any]) -> str:
    """What measures each node's link: hpcmm's own check, if it knows the cluster by name."""
    name, nodes = _text(config, "cluster", "name"), _number(config, "cluster", "nodes", 0)
    if name and nodes > 2 and not _is_local(config):  # of two it cannot say which is slow
        return f"python -m hpcmm.doctor cluster={shlex.quote(name)} --nodes {nodes}"
    return "srun --ntasks-per-node=1 sh -c 'hostname; ip -s link; tc -s qdisc; nstat -az TcpRetransSegs; ibstat'"


_PIPELINE_ADVICE = {
    "stage": "set the split points, or PipelineModule(partition_method=...), by measured cost",
    "bubble": "more micro-batches a step, or an interleaved schedule (several smaller stages a rank)",
}

_EVEN_EXPERTS = (
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
_TRANSFER_ADVICE = {
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
_DEEPSPEED_ADVICE = {
    ("gradients", ""): _FEWER_EXCHANGES,
    ("gradients", "bandwidth"): _FEWER_EXCHANGES,
    ("gradients", "latency"): "fewer, larger buckets: DeepSpeed's reduce_bucket_size and allgather_bucket_size",
    ("sharded parameters", ""): _STAYS_GATHERED,
    ("sharded parameters", "bandwidth"): _STAYS_GATHERED,
    ("sharded parameters", "latency"): "larger stage3_prefetch_bucket_size and stage3_param_persistence_threshold",
}
"""In the keys of its configuration, of a script that trains with DeepSpeed itself."""
_IN_NODE_ADVICE = {
    "sharded parameters": "keep them gathered for backward (reshard_after_forward=False), or prefetch the next ones",
    "activations": "sequence parallel; async tensor parallel (torch.compile); leave outputs sharded (loss_parallel)",
    "tokens of experts or sequence parts": "overlap the exchange with computation",
    "tokens of experts": "overlap the exchange with computation that needs no expert, or send in bf16",
    "sequence parts": "fewer parts of the sequence, or ring attention, which overlaps its sends with computation",
    "pipeline sends": "larger micro-batches send less often; activations in bf16",
}
"""Of groups that lie within a node already, by what moves."""
_SINGLE_ADVICE = {
    "gradients": "exchange them for more work: a larger batch, or several micro-batches for each exchange (no_sync)",
    "small messages": "a larger batch, so that fewer steps wait for it; a loss or metric only when it is logged",
}
"""Of one message a step that latency bounds, by what moves."""

_GPU_ADVICE = {
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
_OS_ADVICE = (
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


_OF_EXCESS = {gpu_findings.COPIES: "gpu_copy", gpu_findings.SETS: "gpu_set"}
"""No other node helps a rank whose GPU does this for longer."""


def _advice_for_gpus(finding: Finding, config: Mapping[str, Any]) -> str:
    if finding.kind == "gpu_wait" and finding.gpu_excess == gpu_findings.IDLES:
        return "see what its host does while that GPU is idle (table idle, ranges), such as loading or a busy core"
    if finding.kind == "gpu_os":
        usual = _GPU_ADVICE["gpu_os"]
        return next((advice for function, advice in _OS_ADVICE if function.search(finding.function)), usual)
    if finding.kind != "gpu_copy":
        return _GPU_ADVICE[finding.kind]
    keys = [
        key for key in ("offload_optimizer", "offload_parameters") if _text(config, "parallel", key) not in {"", "none"}
    ]
    if finding.moves == "offload" and keys:
        return " ".join(f"parallel.{key}=none" for key in keys)
    return copies.ADVICE.get(finding.moves, _GPU_ADVICE["gpu_copy"])


_HELPED_BY_LARGER_BATCHES = {"gpu_host", "gpu_sync", "gpu_order"}
"""More work a launch, for a run whose batch is a key of ours."""


def _override(finding: Finding, config: Mapping[str, Any]) -> str:  # noqa: PLR0911 -- one answer a kind
    match finding.kind:
        case "data":
            return f"data.num_workers={max(2, 2 * _number(config, 'data', 'num_workers', 0))}"
        case "compute" if finding.node:
            return f"cluster.exclude={_excluded(config, finding.node)}"
        case "batch" | "uneven" | "gpu_host" | "gpu_sync" | "gpu_order":
            return _twice_the_micro_batch(config)
        case "checkpoint" | "solo" if finding.kind == "checkpoint" or _SAVES.search(finding.phase):
            return f"train.checkpoint_every={max(4 * _number(config, 'train', 'checkpoint_every', 0), 100)}"
        case "transfer" if finding.moves == "sharded parameters":
            return _whole_parameters(config)
        case "transfer" if finding.bound == "latency" and not finding.is_single and _fills_buckets(finding, config):
            size = _number(config, "parallel", "reduce_bucket_size", 0)
            return f"parallel.reduce_bucket_size={4 * size if size > 0 else 50_000_000}"
        case "transfer":
            # Fewer exchanges a sample. From ZeRO stage 2 on each micro-batch has its own, so that it must be larger.
            if _zero_stage(config) > 1:
                return _twice_the_micro_batch(config)
            rounds = max(1, _number(config, "train", "gradient_accumulation_steps", 1))
            return f"train.gradient_accumulation_steps={2 * rounds}"
        case "imbalance":
            return f"cluster.cpus_per_rank={_number(config, 'cluster', 'cpus_per_rank', 1) + 1}"
        case _:
            return f"train.log_every={max(4 * _number(config, 'train', 'log_every', 10), 50)}"


def _fills_buckets(finding: Finding, config: Mapping[str, Any]) -> bool:
    """Whether larger buckets would be fewer. Without ZeRO DeepSpeed makes them of a size of its own."""
    elements = finding.step_bytes / _LEAST_BYTES_OF_AN_ELEMENT
    return _zero_stage(config) > 0 and elements > _number(config, "parallel", "reduce_bucket_size", 0)


_LEAST_BYTES_OF_AN_ELEMENT = 2


def _whole_parameters(config: Mapping[str, Any]) -> str:
    """ZeRO stage 2, with what of the recipe takes stage 3 set back."""
    back = {"offload_parameters": ("none", "none"), "encoders": ("along", "along")}
    if _text(config, "parallel", "offload_optimizer") == "nvme":
        back["offload_optimizer"] = ("none", "cpu")
    keys = [
        f"parallel.{key}={instead}"
        for key, (usual, instead) in back.items()
        if _text(config, "parallel", key) not in {"", usual}
    ]
    return " ".join(["parallel.zero_stage=2", *keys])


def _zero_stage(config: Mapping[str, Any]) -> int:
    return _number(config, "parallel", "zero_stage", 0)


def _twice_the_micro_batch(config: Mapping[str, Any]) -> str:
    return f"train.micro_batch_size={2 * max(1, _number(config, 'train', 'micro_batch_size', 1))}"


def _advice(finding: Finding) -> str:  # noqa: PLR0911 -- one answer a kind
    match finding.kind:
        case "data":
            return "load in processes, or more of them, beside the training: torch.utils.data.DataLoader(num_workers=N)"
        case "compute" if finding.node:
            return f"sbatch --exclude={shlex.quote(finding.node)} ..."
        case "batch" | "uneven":
            return "bucket examples by length, or share them out over the ranks by their cost"
        case "checkpoint":
            return "save less often, or from a thread of its own"
        case "solo":
            return _advice_for_solo_work(finding.phase)
        case "imbalance":
            return "sbatch --cpus-per-task=N --hint=nomultithread ... with more cores a rank"
        case "other" if finding.function in _WRITING:
            return "print, log or save less often there, or from a thread of its own"
        case "other":
            return "with annotate.phase(...) around each part of the step, the next capture tells which part it is"
        case _:
            return "log and evaluate less often; if it loads there, DataLoader(num_workers=N): ranges tell what it is"


_WRITING = frozenset({"write", "writev", "pwrite", "pwrite64", "fwrite", "fputs", "fflush", "fsync", "fdatasync"})
_SAVES = re.compile("check|ckpt|save|snapshot", re.IGNORECASE)
_EVALUATES = re.compile("eval|val|test|generat|sampl|metric", re.IGNORECASE)
_LOGS = re.compile("log|print|report|wandb|tensorboard|plot|monitor", re.IGNORECASE)


def _advice_for_solo_work(phase: str) -> str:
    """By what the range says it is; all three if none says anything."""
    if _SAVES.search(phase):
        return "let each rank save its part in the background (torch.distributed.checkpoint.async_save), or less often"
    if _EVALUATES.search(phase):
        return "evaluate on all ranks, each a part (DistributedSampler), less often, or in a job of its own"
    if _LOGS.search(phase):
        return "log less often, or from a thread of its own"
    return (
        "share it out over all ranks (an evaluation, a sharded checkpoint), do it less often, or in a thread or job of "
        "its own"
    )


def _excluded(config: Mapping[str, Any], node: str) -> str:
    """The run's own excluded nodes and this one, as one word of Hydra's grammar."""
    cluster = config.get("cluster")
    before = cluster.get("exclude") if isinstance(cluster, Mapping) else None
    nodes = f"{before},{node}" if isinstance(before, str) and before else node
    if all(character.isalnum() or character in "_-." for character in nodes):
        return nodes
    # Within quotes Hydra takes anything; the shell gets the whole as one word.
    text = nodes.replace("\\", "\\\\").replace("'", "\\'")
    return shlex.quote(f"'{text}'")


def _number(config: Mapping[str, Any], section: str, key: str, default: int) -> int:
    value = config.get(section)
    value = value.get(key, default) if isinstance(value, Mapping) else default
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _text(config: Mapping[str, Any], section: str, key: str) -> str:
    value = config.get(section)
    value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""
