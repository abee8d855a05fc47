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

from hpcmm.analysis import advice, copies, gpu_findings, host_calls
from hpcmm.analysis.findings import Finding
from hpcmm.analysis.range_names import part_of_a_step, words


def suggest(
    finding: Finding, config: Mapping[str, Any], cpus: int = 0, framework: str = "", *, has_slurm: bool = True
) -> str:
    """One override or command for ``finding``; ``cpus``: of the smallest node, 0 if that is not known.

    ``framework``: that a script of the user's imports, such as ``deepspeed``, or that the run has no Python; empty if
    that is not known.

    ``config`` is what decides how the run's ranks ran: its configuration, of it the section ``cluster`` alone where it
    ran a script of the user's, or empty if there is none. ``has_slurm``: whether the ranks may be Slurm's, whose
    commands do nothing for those that torchrun or mpirun started.
    """
    has_slurm = has_slurm and not _is_local(config)
    if framework == advice.WITHOUT_PYTHON and (told := advice.without_python(finding, has_slurm=has_slurm)):
        return told
    if finding.kind == "gpu_data":
        return suggest(replace(finding, kind="data"), config, cpus, framework, has_slurm=has_slurm)
    if finding.kind in host_calls.ADVICE:
        return host_calls.ADVICE[finding.kind]
    return _suggestion(finding, config, cpus, framework, has_slurm=has_slurm)


def _suggestion(  # noqa: PLR0911 -- one answer a kind
    finding: Finding, config: Mapping[str, Any], cpus: int, framework: str, *, has_slurm: bool
) -> str:
    trains = bool(config) and set(config) != {"cluster"}
    ours = {"", "gradients"} | ({"sharded parameters"} if _zero_stage(config) > 2 else set())
    if finding.kind in {"stall", "subprocess", "interruption"} or (finding.kind == "transfer" and finding.node):
        return _shell(finding, has_slurm=has_slurm)
    if finding.kind == "unseen":
        return _capture_all(config, has_slurm=has_slurm)
    if finding.kind == "few":
        return "capture more steps, ten or more: they tell a rank that is always late from chance"
    if finding.is_slow:
        return _find_the_link(config, has_slurm=has_slurm)
    if trains and (own := _key_of_recipe(finding, config)):
        return own
    if finding.kind in advice.PIPELINE or (finding.kind == "transfer" and not (trains and finding.moves in ours)):
        return _advice_for_what_moves(finding, framework)
    if finding.kind == "experts":
        return advice.EVEN_EXPERTS
    if finding.kind in advice.GPU and not (trains and finding.kind in _HELPED_BY_LARGER_BATCHES):
        return _advice_for_gpus(finding, config)
    if finding.kind == "compute" and finding.gpu_excess in _OF_EXCESS:
        return advice.GPU[_OF_EXCESS[finding.gpu_excess]]
    if finding.kind == "compute" and _has_no_other_node(finding, config):
        return _look_at_the_rank(finding, config, framework)
    scheduled = finding.kind == "imbalance" or (finding.kind == "compute" and finding.node != "")
    shared = _shared_cpus(config, cpus) if finding.kind == "imbalance" else ""
    return shared or (
        _override(finding, config) if trains or (config and scheduled) else _advice(finding, has_slurm=has_slurm)
    )


def _capture_all(config: Mapping[str, Any], *, has_slurm: bool) -> str:
    """How to have a report of each rank."""
    if not config:
        by_slurm = "srun nsys profile -o report_%q{SLURM_PROCID} python ..., or " if has_slurm else ""
        return (
            f"capture each rank: {by_slurm}"
            "torchrun --no-python nsys profile -o report_%q{RANK} python ..., or one report a node of all of its "
            "ranks: nsys profile -o report_%h torchrun ..."
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
    if finding.kind in advice.PIPELINE:
        return advice.PIPELINE[finding.kind] if not finding.moves else f"{finding.moves}: {advice.PIPELINE['stage']}"
    if framework == "deepspeed" and (settings := advice.DEEPSPEED.get((finding.moves, finding.bound))):
        return settings
    usual = advice.TRANSFER[finding.moves, finding.bound]
    if finding.is_in_node and "within a node" in usual:
        return advice.IN_NODE[finding.moves]
    return advice.SINGLE.get(finding.moves, usual) if finding.is_single else usual


def _has_no_other_node(finding: Finding, config: Mapping[str, Any]) -> bool:
    """Whether no other node can stand in for the finding's, or which one that is is not known."""
    if not config:
        return finding.is_only_node or not finding.node
    return finding.node != "" and _number(config, "cluster", "nodes", 0) == 1 and _is_local(config)


def _look_at_the_rank(finding: Finding, config: Mapping[str, Any], framework: str) -> str:
    """What to look at if no other node can stand in for the rank's, or which that is is not known.

    The other ranks run there as well, as far as is known: what else runs on the node comes last.
    """
    where = "this machine" if _is_local(config) else finding.node or "its node"
    if finding.gpu_excess == gpu_findings.COMPUTES:
        return f"on {where}: nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE, for a GPU that is slowed down"
    tells = "samples of the CPU (nsys profile --sample=process-tree) tell"
    if framework != advice.WITHOUT_PYTHON:
        tells = "py-spy record --pid PID tells"
    return (
        "if it stays with the rank in another run, so do its samples, its part of the model, or a branch of the "
        f"program on the rank, and {tells} which; if not, see what else uses the cores of {where}: top"
    )


def _is_local(config: Mapping[str, Any]) -> bool:
    """Whether the run had this machine alone, whose node nothing can exclude."""
    cluster = config.get("cluster")
    return isinstance(cluster, Mapping) and cluster.get("executor") == "local"


def _shell(finding: Finding, *, has_slurm: bool) -> str:
    match finding.kind:
        case "stall":
            return _on(finding.node, "dmesg -T | grep -iE 'throttl|oom|hung|link'", has_slurm=has_slurm)
        case "interruption":
            return _on_each_node("ip -s link; dmesg -T | grep -i link | tail", has_slurm=has_slurm)
        case "transfer":
            return _on(finding.node, "ip -s link; tc -s qdisc", has_slurm=has_slurm)
        case _:
            return "grep 'within step' analysis/waitpid.csv"


def _on(node: str, command: str, *, has_slurm: bool) -> str:
    """``command`` where it can be typed: through Slurm, or on the node itself."""
    if not has_slurm:
        return f"on {node or 'its node'}: {command}"
    whole = f"sh -c '{command}'" if ";" in command else command
    return f"srun -w {shlex.quote(node)} {whole}"


def _on_each_node(command: str, *, has_slurm: bool) -> str:
    return f"srun --ntasks-per-node=1 sh -c 'hostname; {command}'" if has_slurm else f"on each node: {command}"


def _find_the_link(config: Mapping[str, Any], *, has_slurm: bool) -> str:
    """What measures each node's link: hpcmm's own check, if it knows the cluster by name."""
    name, nodes = _text(config, "cluster", "name"), _number(config, "cluster", "nodes", 0)
    if name and nodes > 2 and not _is_local(config):  # of two it cannot say which is slow
        return f"python -m hpcmm.doctor cluster={shlex.quote(name)} --nodes {nodes}"
    return _on_each_node("ip -s link; tc -s qdisc; nstat -az TcpRetransSegs; ibstat", has_slurm=has_slurm)


_OF_EXCESS = {gpu_findings.COPIES: "gpu_copy", gpu_findings.SETS: "gpu_set"}
"""No other node helps a rank whose GPU does this for longer."""


def _advice_for_gpus(finding: Finding, config: Mapping[str, Any]) -> str:
    if finding.kind == "gpu_wait" and finding.gpu_excess == gpu_findings.IDLES:
        return "see what its host does while that GPU is idle (table idle, ranges), such as loading or a busy core"
    if finding.kind == "gpu_os":
        usual = advice.GPU["gpu_os"]
        return next((told for function, told in advice.OS if function.search(finding.function)), usual)
    if finding.kind != "gpu_copy":
        return advice.GPU[finding.kind]
    keys = [
        key for key in ("offload_optimizer", "offload_parameters") if _text(config, "parallel", key) not in {"", "none"}
    ]
    if finding.moves == "offload" and keys:
        return " ".join(f"parallel.{key}=none" for key in keys)
    return copies.ADVICE.get(finding.moves, advice.GPU["gpu_copy"])


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


def _advice(finding: Finding, *, has_slurm: bool) -> str:  # noqa: PLR0911 -- one answer a kind
    match finding.kind:
        case "data":
            return _LOAD
        case "compute" if finding.node:
            excluded = f"sbatch --exclude={shlex.quote(finding.node)} ..."
            return excluded if has_slurm else f"leave {finding.node} out of the nodes that you launch on"
        case "batch" | "uneven":
            return "bucket examples by length, or share them out over the ranks by their cost"
        case "checkpoint":
            return "save less often, or from a thread of its own"
        case "solo":
            return _advice_for_solo_work(finding.phase)
        case "imbalance":
            return advice.MORE_CORES if has_slurm else advice.MORE_CORES_WITHOUT_SLURM
        case "other" if finding.function in _WRITING:
            return "print, log or save less often there, or from a thread of its own"
        case "other":
            return "with annotate.phase(...) around each part of the step, the next capture tells which part it is"
        case _:
            return "log and evaluate less often; if it loads there, DataLoader(num_workers=N): ranges tell what it is"


_WRITING = frozenset({"write", "writev", "pwrite", "pwrite64", "fwrite", "fputs", "fflush", "fsync", "fdatasync"})
_SAVES = re.compile("check|ckpt|save|snapshot", re.IGNORECASE)
_EVALUATES = ("eval", "val", "test", "generat", "sampl")
_LOGS = ("log", "print", "report", "wandb", "tensorboard", "plot", "monitor")
"""How words of a range begin that evaluates, or logs."""
_LOAD = "load in processes, or more of them, beside the training: torch.utils.data.DataLoader(num_workers=N)"


def _advice_for_solo_work(phase: str) -> str:
    """By what the range says it is; all three if none says anything."""
    if _SAVES.search(phase):
        return "let each rank save its part in the background (torch.distributed.checkpoint.async_save), or less often"
    if part_of_a_step(phase) == "data":
        return _LOAD
    said = words(phase)
    if any(word.startswith(_EVALUATES) for word in said):
        return "evaluate on all ranks, each a part (DistributedSampler), less often, or in a job of its own"
    if any(word.startswith(_LOGS) for word in said):
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
