"""The typed run configuration: every key that a run can have, with its type, default and meaning.

Hydra merges ``conf/`` into :class:`RunConfig`; a key that is not a field here is refused. The result is frozen into
``config.yaml`` of the run directory, and what the ranks need of it into ``rank.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from hpcmm.config.keys import MISSING, PartGroup, key, made_by
from hpcmm.config.train_sections import LossScaleConfig, UntilConfig
from hpcmm.text import StrEnum


class Executor(StrEnum):
    """Who starts the ranks."""

    slurm = "slurm"
    local = "local"


SCRIPT = "script"
"""``task.name`` of a script, module or executable of the user's."""
FUNCTION = "function"
"""``task.name`` of a Python function of the user's."""


SUBMIT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
"""What ``cluster.submit_environment`` may set. Any other variable would change more than which cluster is asked."""


OPTIMIZER = PartGroup(
    "optimizer", "torch.optim.optimizer.Optimizer", given=("params",), offered=("lr", "betas", "weight_decay")
)
"""Any optimizer class in PyTorch's form, with its parameters."""


def cluster_variables(given: Mapping[Any, Any]) -> dict[str, str]:
    """Those of ``given`` that ``cluster.submit_environment`` may set, which older configurations did not keep to."""
    return {name: str(given[name]) for name in SUBMIT_VARIABLES if name in given}


class ContainerEngine(StrEnum):
    """What starts the ranks in a container."""

    pyxis = "pyxis"
    """Slurm's plugin for enroot: srun itself takes the image."""
    apptainer = "apptainer"


class GpuOption(StrEnum):
    """The option of Slurm's commands that asks for GPUs."""

    gpus_per_node = "gpus_per_node"
    gres = "gres"
    """Which clusters take that do not select nodes by ``select/cons_tres``."""


class Analyze(StrEnum):
    """When a profiled run is analysed."""

    never = "never"
    after = "after"
    """By a job of its own, which waits for the run's end."""


class Precision(StrEnum):
    """Number format of parameters and gradients."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    """With a scaled loss, for GPUs that have no bf16."""
    fp8 = "fp8"
    """bf16, but the linear maps of a language model's layers multiply in 8 bits, on GPUs that can."""


class Offload(StrEnum):
    """Where what ZeRO has divided is kept between uses."""

    none = "none"
    """On the GPU."""
    cpu = "cpu"
    nvme = "nvme"
    """On the nodes' own disks, in ``parallel.nvme_path``."""


class SequenceAttention(StrEnum):
    """How ranks that share a sequence compute its attention together."""

    ulysses = "ulysses"
    """Each gets all tokens of some heads, by all-to-all; the degree must divide the heads."""
    ring = "ring"
    """Each keeps its tokens, and keys and values go round; any degree."""


class Encoders(StrEnum):
    """How the encoders of a multimodal model are spread."""

    along = "along"
    """As the language model."""
    replicated = "replicated"
    """Whole on each rank, each for its share of the micro-batch, beside a divided language model."""


class Schedule(StrEnum):
    """Shape of the learning rate over a run, after a linear warm-up."""

    constant = "constant"
    cosine = "cosine"


class Requeue(StrEnum):
    """When an unfinished run goes back into the queue by itself, to go on from its last checkpoint."""

    never = "never"
    on_stop = "on_stop"
    """After it was warned of its time limit or of a preemption, and saved a checkpoint."""
    on_node_failure = "on_node_failure"
    """Then, and when Slurm takes a node away without warning: it failed, or a preemption gives no time."""
    slurm = "slurm"
    """Slurm's own requeue alone, for scripts that save checkpoints by themselves and need no word to stop."""


class StageCheck(StrEnum):
    """What is compared of a copied file."""

    sizes = "sizes"
    checksum = "checksum"
    """Also what the disk holds, read again, with what was read from the source."""


@dataclass
class TaskConfig:
    """What every rank runs, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment."""

    name: str = key(SCRIPT, "``script``, ``function``, or the name of a workload in ``conf/task/``.")
    _target_: str | None = None
    """The workload's class, as package.module.Class: a subclass of :class:`hpcmm.config.workload.Workload`."""
    path: str | None = key(None, "The script; for task=script. Or write it behind ``--``.")
    module: str | None = key(None, "In place of a script a module, which runs as by ``python -m``.")
    program: str | None = key(None, "In place of a script an executable.")
    args: list[str] = made_by(list, "The script's command line, passed on as it is written.")
    target: str | None = key(None, "The function, as package.module:function; for task=function.")
    kwargs: dict[str, Any] = made_by(dict, "The function's keyword arguments.")


@dataclass
class ContainerConfig:
    """The container that the ranks run in. hpcmm's code is mounted into it; scripts need Python 3.9 or later there."""

    engine: ContainerEngine | None = key(None, "``pyxis`` or ``apptainer``; None for no container.")
    image: str | None = key(None, "Whatever the engine takes: a registry's address, or a .sqsh or .sif file.")
    mounts: list[str] = made_by(
        list,
        "Folders of the nodes to show inside, as SOURCE or SOURCE:TARGET; those of the run and of its code always are.",
    )
    arguments: list[str] = made_by(
        list, "Further arguments of ``apptainer exec``, or of srun for pyxis, each one word."
    )


@dataclass
class LaunchConfig:
    """How a run is handed over."""

    snapshot: bool = key(True, "Copy the code into the run directory, so that a queued job runs what was submitted.")
    snapshot_limit_mb: int = key(200, "A snapshot above this size is refused.", least=1)
    include: list[str] = made_by(
        list,
        "Files and folders of the project to copy though git ignores them, by paths from the working directory or the "
        "project; ``*`` and ``**`` stand for any name.",
    )
    parallel_points: int | None = key(
        None, "Most points of a sweep that run at once; None leaves it to the scheduler.", least=1
    )
    config_dir: str | None = key(
        None,
        "Folders with config groups of your own, several by ``:``, beside hpcmm's: ``cluster/``, ``task/`` and so on. "
        "Give it on the command line; ``--config-dir DIR`` is the same. See docs/launching.md for others.",
    )
    stage: list[str] = made_by(
        list, "Files and folders to copy to each node's own disk before the ranks start; HPCMM_STAGE_DIR tells where."
    )
    stage_check: StageCheck = key(StageCheck.sizes, "``sizes``, or ``checksum`` to read each copy again.")
    check_rendezvous: bool = key(
        True, "Check on each node, before its ranks start, that MASTER_ADDR resolves there and can be reached."
    )
    hang_s: float | None = key(
        None,
        "Seconds without a sign of progress from any rank after which the job is taken to hang: its ranks' stacks are "
        "kept, and it is ended, or queued again with requeue=on_node_failure, or on_stop if it has a checkpoint.",
        least=10,
    )
    preflight: bool = key(False, "Check all nodes of the job before the ranks start, and train on good ones only.")
    spare_nodes: int = key(
        0, "Nodes that the job holds beyond ``cluster.nodes``, to replace those that the check finds bad.", least=0
    )


@dataclass
class ClusterConfig:
    """Where the job runs, and what it asks the scheduler for."""

    name: str = key(MISSING)
    executor: Executor = key(Executor.slurm, "``slurm``, or ``local`` for processes on this machine.")
    nodes: int = key(1, "Compute nodes of a job.", least=1)
    ranks_per_node: int = key(1, "Processes on each node; one a GPU.", least=1)
    cpus_per_rank: int = key(1, "Processor cores of each rank.", least=1)
    gpus_per_node: int = key(0, least=0)
    gpu_type: str | None = key(None, "The GPUs' type as Slurm names it (``a30``), where a partition has several.")
    gpu_option: GpuOption = key(
        GpuOption.gpus_per_node, "How Slurm is asked for GPUs: by ``gpus_per_node``, or by ``gres`` if it refuses that."
    )
    memory_gb: float | None = key(None, "Memory of a node in GB; None leaves it to the scheduler's default.")
    time_limit_min: int = key(60, "Minutes after which Slurm ends the job.", least=1)
    partition: str | None = key(None)
    account: str | None = key(None)
    qos: str | None = key(None)
    constraint: str | None = key(None, "Features that the nodes must have, as ``sbatch --constraint`` takes them.")
    exclude: str | None = key(None, "Nodes not to use, as a Slurm host list.")
    template: str = key("train.sbatch.j2", "The sbatch template's file name in ``slurm/``.")
    sbatch: dict[str, str] = made_by(dict, "Further ``#SBATCH --key=value`` lines.")
    srun: list[str] = made_by(list, "Further arguments of ``srun``, each one word.")
    modules: list[str] = made_by(list, "Environment modules to load on the nodes.")
    setup: list[str] = made_by(
        list, "Lines of shell that the job runs first, as they are: activating an environment, raising a limit."
    )
    python: str | None = key(
        None,
        "The Python that runs the ranks, 3.9 or later, or its environment's folder; None takes the one that launches.",
    )
    container: ContainerConfig = made_by(ContainerConfig)
    environment: dict[str, str] = made_by(
        dict, "Environment variables of every rank; quoted when they are written into the script."
    )
    environment_from: list[str] = made_by(
        list,
        "Names of variables of the launching shell that every rank gets. Their values, such as an access token, are "
        "written nowhere.",
    )
    submit_environment: dict[str, str] = made_by(
        dict,
        "How ``sbatch``, ``squeue`` and ``sacct`` find the cluster: ``SLURM_CONF``, ``SLURM_CLUSTERS``. No other "
        "variable can be set; ``SLURM_JWT`` is taken from the shell, and written nowhere.",
    )
    cache_dir: str | None = key(
        None,
        "Folder that outlives runs: compiled ops, generated data. In one that other users can write, a folder of your "
        "own within, ``hpcmm-UID``, is used. None: the user's cache folder.",
    )
    scratch_dir: str | None = key(
        None,
        "Folder on the nodes' own disks for launch.stage; variables of the job in it are replaced. None: SLURM_TMPDIR, "
        "TMPDIR or /tmp.",
    )
    kill_wait_s: int = key(60, "Seconds that the other ranks of a step may live once one has ended.", least=1)
    stop_warning_s: int | None = key(
        None,
        "Seconds before the time limit at which Slurm warns the job, which then ends its step, saves a checkpoint"
        " and finishes its reports. A preemption gives the partition's or QOS' grace time instead. 0: no warning;"
        " None: 120, or a quarter of a short time limit. With requeue=slurm the ranks get the warning, as SIGUSR1;"
        " None is 0 then.",
        least=0,
    )

    @property
    def gpu_request(self) -> dict[str, str]:
        """The option of ``sbatch`` and ``srun`` that asks for the GPUs of each node; empty without any."""
        if not self.gpus_per_node:
            return {}
        wanted = f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)
        return {"gres": f"gpu:{wanted}"} if self.gpu_option is GpuOption.gres else {"gpus-per-node": wanted}


@dataclass
class TrainConfig:
    """The optimisation."""

    steps: int = key(100, least=1)
    micro_batch_size: int = key(4, "Examples that a rank puts through the model at once.", least=1)
    gradient_accumulation_steps: int = key(1, least=1)
    global_batch_size: int | None = key(
        None, "Checked against micro_batch_size x gradient_accumulation_steps x world size; None computes it."
    )
    learning_rate: float = key(1e-3, above=0)
    weight_decay: float = key(1e-3, least=0)
    betas: list[float] = made_by(lambda: [0.9, 0.95])
    schedule: Schedule = key(Schedule.cosine)
    warmup_steps: int = key(10, least=0)
    gradient_clip: float = key(1.0, above=0)
    init_from: str | None = key(
        None, "Run whose trained weights training starts from: a run directory, or its name within ``runs_root``."
    )
    seed: int = key(0, least=0)
    log_every: int = key(10, least=1)
    checkpoint_every: int = key(
        0, "Steps between checkpoints; 0 saves only at the end, and when the job is asked to stop.", least=0
    )
    keep_checkpoints: int = key(2, "How many of the newest checkpoints stay.", least=1)
    evaluate: bool = key(True, "Score the held-out data before and after training.")
    evaluate_every: int = key(0, "Steps between scores on the held-out data while training; 0: none.", least=0)
    until: UntilConfig = made_by(UntilConfig)
    loss_scale: LossScaleConfig = made_by(LossScaleConfig)


@dataclass
class ParallelConfig:
    """How the model is spread over the ranks: the recipe."""

    name: str = key("zero2", "What the recipe is called: a name in ``conf/parallel/``.")
    _target_: str | None = None
    """The recipe's class, as package.module.Class: a subclass of :class:`hpcmm.config.recipe.Recipe`; None: itself."""
    mesh: dict[str, int] = made_by(
        dict,
        "Ranks along each axis: ``pipeline``, ``data``, ``sequence``, ``tensor``, and ``expert``, which is part of "
        "data. -1: the ranks that the others leave, as ``data`` has it if it is not named.",
    )
    zero_stage: int = key(2, "What ZeRO divides: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters.")
    precision: Precision = key(
        Precision.fp32, "``fp32``, ``bf16``, ``fp16``, or ``fp8``, in which a language model's linear maps multiply."
    )
    attention: SequenceAttention = key(
        SequenceAttention.ulysses, "``ulysses`` or ``ring``: attention over the axis ``sequence``."
    )
    encoders: Encoders = key(
        Encoders.along,
        "``along``: as the language model; ``replicated``: whole on each rank beside a divided language model.",
    )
    pipeline_layers: list[int] | None = key(
        None, "Layers of each pipeline stage, from the first on; None: so that the stages cost about the same."
    )
    activation_checkpointing: bool = key(
        False, "Compute a layer's activations again in the backward pass in place of keeping them."
    )
    offload_optimizer: Offload = key(Offload.none, "``none``, ``cpu`` or ``nvme``: where optimizer states are kept.")
    offload_parameters: Offload = key(Offload.none, "``none``, ``cpu`` or ``nvme``, with ZeRO stage 3.")
    nvme_path: str | None = key(None, "Folder on the nodes' own disks, for offloading to ``nvme``.")
    reduce_bucket_size: int = key(5_000_000, least=1)
    allgather_bucket_size: int = key(5_000_000, "Elements, not bytes, of one communication bucket.", least=1)
    overlap_comm: bool = key(False)
    rendezvous_timeout_s: int = key(300, least=1)
    collective_timeout_s: int = key(600, least=1)
    threads_per_rank: int | None = key(None, "OpenMP threads of a rank; None takes ``cluster.cpus_per_rank``.", least=1)


@dataclass
class ProfileConfig:
    """Which ranks a profiler wraps, and with which flags."""

    name: str = key("off")
    tool: str | None = key(None, "``nsys``, or None for no profiler.")
    flags_file: str | None = key(None, "YAML file in ``profiles/nsys/`` with the flags of ``nsys profile``.")
    ranks: str = key("all", "``all``, ``one_per_node``, or a list such as ``0,3-5``.")
    steps: str | None = key(
        None, "Steps to record, such as ``100:110`` for the ten from 100 on; None records all, and the start as well."
    )
    required: bool = key(False, "Fail when the profiler is missing on a node, instead of training without it.")


@dataclass
class RunConfig:
    """A whole run. ``config.yaml`` of a run directory is one of these."""

    name: str = key(MISSING, "Start of the run directory's name.")
    runs_root: str = key("runs", "Folder that holds run directories, on a file system that all nodes share.")
    wait: bool = key(False, "Follow the job until it ends.")
    dry_run: bool = key(False, "Print the job's script and each rank's command, and submit nothing.")
    requeue: Requeue = key(Requeue.on_stop, "When the run goes back into the queue by itself.")
    after: str | None = key(
        None,
        "Job id, or run, sweep or point (SWEEP/0003) beside this one, that must have completed before this one starts.",
    )
    stages: dict[str, list[str]] = made_by(
        dict,
        "Runs to queue one after the other by this launch, each from the weights of the one before: a name, and the "
        "overrides that it has beside those of the launch.",
    )
    analyze: Analyze = key(
        Analyze.never, "``after`` queues the analysis behind the run, so that one command ends in tables."
    )
    task: TaskConfig = made_by(TaskConfig)
    launch: LaunchConfig = made_by(LaunchConfig)
    cluster: ClusterConfig = made_by(ClusterConfig)
    train: TrainConfig = made_by(TrainConfig)
    optimizer: Any = key("adamw", "The optimizer: a name in ``conf/optimizer/``.", part=OPTIMIZER)
    parallel: ParallelConfig = made_by(ParallelConfig)
    profile: ProfileConfig = made_by(ProfileConfig)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.cluster.nodes * self.cluster.ranks_per_node

    @property
    def known_steps(self) -> int | None:
        """Steps of the training; None of a script or function, which alone knows."""
        return None if self.task._target_ is None else self.train.steps

    @property
    def global_batch_size(self) -> int:
        """Examples of one optimizer step over all ranks. Raises HpcmmError if the recipe's mesh does not fit them."""
        from hpcmm.config.parts import import_class  # noqa: PLC0415 - a script's Python has none of its packages

        mesh = import_class(self.parallel._target_ or "hpcmm.config.recipe.Recipe")().mesh(self)
        return self.train.micro_batch_size * self.train.gradient_accumulation_steps * int(mesh.data)


def toolkit_values(config: RunConfig) -> dict[str, Any]:
    """The toolkit's keys as plain values, without those that a workload adds."""
    return {each.name: _plain(getattr(config, each.name)) for each in fields(RunConfig)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(each) for key, each in vars(value).items()}
    return value.name if isinstance(value, Enum) else value


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """What :func:`toolkit_values` made plain. A key that is missing has its default.

    It needs no OmegaConf. Raises KeyError, TypeError or AttributeError for other values.
    """
    config = _of_plain(RunConfig, values)
    assert isinstance(config, RunConfig)
    return config


def _of_plain(schema: Any, values: Mapping[str, Any]) -> Any:
    given = {}
    for each in fields(schema):
        if each.name in values:
            value = values[each.name]
            # By its type's text, which Python 3.9 cannot evaluate.
            kind = vars(sys.modules[schema.__module__]).get(str(each.type).partition(" | ")[0])
            if value is not None and is_dataclass(kind):
                value = _of_plain(kind, value)
            elif value is not None and isinstance(kind, type) and issubclass(kind, Enum):
                value = kind[value]
            given[each.name] = value
    return schema(**given)
