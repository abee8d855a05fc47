"""The typed run configuration: every key that a run can have, with its type, default and meaning.

Hydra merges ``conf/`` into :class:`RunConfig`; a key that is not a field here is refused. The result is frozen into
``config.yaml`` of the run directory, which is the only configuration that a rank reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MISSING: Any = "???"
"""OmegaConf's marker of a value that the YAML tree must give."""


class Executor(StrEnum):
    """Who starts the ranks."""

    slurm = "slurm"
    local = "local"


class TaskName(StrEnum):
    """What the ranks run."""

    anomaly = "anomaly"
    """The anomaly detector that hpcmm ships."""
    script = "script"
    """A Python script of the user's."""
    function = "function"
    """A Python function of the user's."""


class ContainerEngine(StrEnum):
    """What starts the ranks in a container."""

    pyxis = "pyxis"
    """Slurm's plugin for enroot: srun itself takes the image."""
    apptainer = "apptainer"


class Analyze(StrEnum):
    """When a profiled run is analysed."""

    never = "never"
    after = "after"
    """By a job of its own, which waits for the run's end."""


class Precision(StrEnum):
    """Number format of parameters and gradients."""

    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(StrEnum):
    """Shape of the learning rate over a run, after a linear warm-up."""

    constant = "constant"
    cosine = "cosine"


class Layout(StrEnum):
    """Folder layout of a data set."""

    mvtec = "mvtec"
    visa = "visa"


class Standins(StrEnum):
    """Which photographs stand-in images are cut from; the two share no photograph and no category."""

    surfaces = "surfaces"
    """Brick, coins, grass, gravel, tissue."""
    scenes = "scenes"
    """Things and surfaces of other kinds, to train on and then score on ``surfaces``."""


class AnomalyKind(StrEnum):
    """How an anomaly is simulated on a normal training image."""

    perlin = "perlin"
    """Areas and cracks of Perlin noise, filled with something else."""
    rectangle = "rectangle"
    """Rectangles and strips, filled with something else."""
    cut_paste = "cut_paste"
    """Pieces of another image, set in by Poisson blending."""


class OnError(StrEnum):
    """What becomes of an image that cannot be used."""

    refuse = "refuse"
    skip = "skip"


class LlmKind(StrEnum):
    """Where the language model comes from."""

    none = "none"
    """No language model: maps and scores, no words."""
    smollm2 = "smollm2"
    """SmolLM2-135M-Instruct, whose weights an installed package holds; converted once into the cache folder."""
    folder = "folder"
    """A ``transformers`` folder of a LLaMA-architecture model, which the site has."""
    tiny = "tiny"
    """A random network of no use but for tests."""


class Requeue(StrEnum):
    """When an unfinished run goes back into the queue by itself, to go on from its last checkpoint."""

    never = "never"
    on_stop = "on_stop"
    """After it was warned of its time limit or of a preemption, and saved a checkpoint."""
    on_node_failure = "on_node_failure"
    """Then, and when Slurm takes a node away without warning: it failed, or a preemption gives no time."""


@dataclass
class TaskConfig:
    """What every rank runs, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment."""

    name: TaskName = TaskName.anomaly
    path: str | None = None
    """The script; for task=script."""
    args: list[str] = field(default_factory=list)
    """The script's command line, passed on as it is written."""
    target: str | None = None
    """The function, as package.module:function; for task=function."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """The function's keyword arguments."""


@dataclass
class ContainerConfig:
    """The container that the ranks run in. hpcmm's code is mounted into it; the image must have what it requires."""

    engine: ContainerEngine | None = None
    """``pyxis`` or ``apptainer``; None for no container."""
    image: str | None = None
    """Whatever the engine takes: a registry's address, or a .sqsh or .sif file."""
    mounts: list[str] = field(default_factory=list)
    """Folders of the nodes to show inside, as SOURCE or SOURCE:TARGET; those of the run and of its code always are."""
    arguments: list[str] = field(default_factory=list)
    """Further arguments of ``apptainer exec``, or of srun for pyxis, each one word."""


@dataclass
class LaunchConfig:
    """How a run is handed over."""

    snapshot: bool = True
    """Copy the code into the run directory, so that a queued job runs what was submitted."""
    snapshot_limit_mb: int = 200
    """A snapshot above this size is refused."""
    parallel_points: int | None = None
    """Most points of a sweep that run at once; None leaves it to the scheduler."""
    preflight: bool = False
    """Check all nodes of the job before the ranks start, and train on good ones only."""
    spare_nodes: int = 0
    """Nodes that the job holds beyond ``cluster.nodes``, to replace those that the check finds bad."""


@dataclass
class ClusterConfig:
    """Where the job runs, and what it asks the scheduler for."""

    name: str = MISSING
    executor: Executor = Executor.slurm
    """``slurm``, or ``local`` for processes on this machine."""
    nodes: int = 1
    """Compute nodes of a job."""
    ranks_per_node: int = 1
    """Processes on each node; one a GPU."""
    cpus_per_rank: int = 1
    """Processor cores of each rank."""
    gpus_per_node: int = 0
    gpu_type: str | None = None
    """The GPUs' type as Slurm names it (``a30``), where a partition has several."""
    memory_gb: float | None = None
    """Memory of a node in GB; None leaves it to the scheduler's default."""
    time_limit_min: int = 60
    """Minutes after which Slurm ends the job."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that the nodes must have, as ``sbatch --constraint`` takes them."""
    exclude: str | None = None
    """Nodes not to use, as a Slurm host list."""
    template: str = "train.sbatch.j2"
    """The sbatch template's file name in ``slurm/``."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further ``#SBATCH --key=value`` lines."""
    srun: list[str] = field(default_factory=list)
    """Further arguments of ``srun``, each one word."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load on the nodes."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the job runs first, as they are: activating an environment, raising a limit."""
    python: str | None = None
    """The Python that runs the ranks; None takes the one that launches."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank; quoted when they are written into the script."""
    submit_environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of ``sbatch``, ``squeue`` and ``sacct`` on the login node (``SLURM_CONF``)."""
    cache_dir: str | None = None
    """Shared folder that outlives runs: compiled ops, generated data. None: the user's cache folder."""
    kill_wait_s: int = 60
    """Seconds that the other ranks of a step may live once one has ended."""
    stop_warning_s: int | None = None
    """Seconds before the time limit at which Slurm warns the job, which then ends its step, saves a checkpoint and
    finishes its reports. A preemption gives the partition's or QOS' grace time instead. 0: no warning; None: 120, or a
    quarter of a short time limit."""


@dataclass
class DataConfig:
    """Images in MVTec-AD's or VisA's folder layout, and the text that goes with them."""

    layout: Layout = Layout.mvtec
    """``mvtec`` or ``visa``."""
    root: str | None = None
    """Folder with one sub-folder a category. None: the stand-ins, in ``cluster.cache_dir``."""
    standins: Standins = Standins.surfaces
    """Which stand-ins, where ``root`` is None."""
    test_root: str | None = None
    """Another data set to score on, such as MVTec-AD after training on VisA. None: the test images of ``root``."""
    test_standins: Standins | None = None
    """Other stand-ins to score on, where both ``root`` and ``test_root`` are None."""
    test_layout: Layout | None = None
    """Layout of ``test_root``; None: ``layout``."""
    test_categories: list[str] = field(default_factory=list)
    """Categories of ``test_root`` or ``test_standins`` to use; empty for all."""
    shots: int | None = None
    """Normal images a category to train on, drawn by the seed; None for all."""
    on_error: OnError = OnError.refuse
    """An unreadable image, or a mask of another size than its image: ``refuse`` ends the run, ``skip`` warns, takes the
    next image in training, and leaves it out of the scores."""
    generate: bool = False
    """Make the stand-ins where they are needed and not there. A folder that ``root`` names is never written to."""
    categories: list[str] = field(default_factory=list)
    """Categories to use; empty for all that lie under ``root``."""
    image_size: int = 128
    """Side of the square images that the model sees, in pixels."""
    train_images_per_category: int = 24
    test_images_per_category: int = 20
    """Half of them with a defect. Both counts are for the generator only."""
    anomaly_probability: float = 0.5
    """Share of the training images that get a simulated defect."""
    anomaly_kinds: list[AnomalyKind] = field(default_factory=lambda: list(AnomalyKind))
    """Kinds of simulated defects, each as likely: ``perlin``, ``rectangle``, ``cut_paste``."""
    num_workers: int = 0
    """Loader processes a rank; 0 decodes in the rank's own process."""
    prefetch_batches: int = 2
    """Micro-batches that each loader process makes ahead."""
    feature_cache: bool = False
    """Compute the frozen image encoder's features before training, once for all runs, and keep them in
    ``cluster.cache_dir``. What happens to an image is then drawn ``feature_variants`` times, and repeats after that."""
    feature_variants: int = 4
    """How many ways a training image is changed (augmentation, simulated anomaly) with ``feature_cache``."""
    slow_rank: int | None = None
    """Rank whose loading is made slow, to learn what a straggler looks like."""
    slow_s: float = 0.0
    """Seconds added to each batch of ``slow_rank``."""


@dataclass
class LlmConfig:
    """The language model that says whether and where there is an anomaly."""

    kind: LlmKind = LlmKind.none
    path: str | None = None
    """Folder with ``config.json``, tokenizer and ``.safetensors``; for ``kind=folder``."""
    frozen: bool = True
    """Whether the model's own weights stay as they are; the prompts, and LoRA, train all the same."""
    lora_rank: int = 8
    """Rank of the low-rank updates (LoRA) of ``lora_targets``; 0 for none."""
    lora_alpha: float = 16.0
    """The updates are multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """The linear maps of each layer that get an update."""
    human_turn: str = "### Human: "
    """What stands between the first token and a question's image, in the words that the model was tuned on."""
    assistant_turn: str = "\n### Assistant: "
    """What stands between a question and its answer."""
    max_question_tokens: int = 96
    """A longer question is cut."""
    max_answer_tokens: int = 32
    """Most tokens of an answer."""


@dataclass
class ModelConfig:
    """Encoders, decoder and language model of the anomaly detector."""

    image_encoder: str = "efficientnet_lite0"
    image_weights: str | None = None
    """The image encoder's weights: a file with a state dict (EfficientNet-Lite0, ImageBind) or a ``transformers``
    folder (CLIP, ViT). None: those that the installed package ships, for EfficientNet-Lite0 alone."""
    image_taps: list[int] = field(default_factory=list)
    """Blocks of a vision transformer, from 0 on, whose patch features the decoder gets; empty: four, evenly spread."""
    text_tower: str = "sentence"
    """``sentence``, or ``clip`` or ``imagebind``: the text tower that shares a space with the image encoder."""
    text_encoder: str | None = None
    """Folder of a ``transformers`` text encoder. None: for ``sentence`` the MiniLM that the installed package ships,
    for ``clip`` the folder of ``image_weights``, for ``imagebind``, of which it gives the tokenizer, the folder that
    ``image_weights`` lies in."""
    freeze_image_encoder: bool = True
    """The text encoder is always frozen."""
    decoder: str = "fcn"
    decoder_width: int = 256
    """Channels of the decoder's feature maps."""
    text_adapter_width: int = 2048
    """Hidden width of the network that adapts text embeddings to the patch features."""
    temperature: float = 0.07
    """Divides the cosine similarity of patch and text."""
    llm: LlmConfig = field(default_factory=LlmConfig)


@dataclass
class TrainConfig:
    """The optimisation."""

    steps: int = 100
    micro_batch_size: int = 4
    """Images that a rank puts through the model at once."""
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    """Checked against micro_batch_size x gradient_accumulation_steps x world size; None computes it."""
    learning_rate: float = 1e-3
    words_learning_rate: float | None = None
    """That of prompts and language model; None: ``learning_rate``."""
    weight_decay: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 10
    gradient_clip: float = 1.0
    focal_gamma: float = 2.0
    focal_alpha: float = 0.75
    """Weight of abnormal pixels in the focal loss; normal ones have 1 - focal_alpha."""
    focal_weight: float = 5.0
    dice_weight: float = 1.0
    text_weight: float = 1.0
    """Weight of the cross-entropy of the answers' tokens; of no effect without a language model."""
    init_from: str | None = None
    """Run whose trained weights training starts from: a run directory, or its name within ``runs_root``."""
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves only at the end, and when the job is asked to stop."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    evaluate: bool = True
    """Score the held-out images before and after training."""


@dataclass
class ParallelConfig:
    """How the model is spread over the ranks."""

    zero_stage: int = 2
    precision: Precision = Precision.fp32
    reduce_bucket_size: int = 5_000_000
    allgather_bucket_size: int = 5_000_000
    """Elements, not bytes, of one communication bucket."""
    overlap_comm: bool = False
    rendezvous_timeout_s: int = 300
    collective_timeout_s: int = 600
    threads_per_rank: int | None = None
    """OpenMP threads of a rank; None takes ``cluster.cpus_per_rank``."""


@dataclass
class ProfileConfig:
    """Which ranks a profiler wraps, and with which flags."""

    name: str = "off"
    tool: str | None = None
    """``nsys``, or None for no profiler."""
    flags_file: str | None = None
    """YAML file in ``profiles/nsys/`` with the flags of ``nsys profile``."""
    ranks: str = "all"
    """``all``, ``one_per_node``, or a list such as ``0,3-5``."""
    steps: str | None = None
    """Steps to record, such as ``100:110`` for the ten from 100 on; None records all, and the start as well."""
    required: bool = False
    """Fail when the profiler is missing on a node, instead of training without it."""


@dataclass
class RunConfig:
    """A whole run. ``config.yaml`` of a run directory is one of these."""

    name: str = MISSING
    """Start of the run directory's name."""
    runs_root: str = "runs"
    """Folder that holds run directories, on a file system that all nodes share."""
    wait: bool = False
    """Follow the job until it ends."""
    dry_run: bool = False
    """Print the job's script and each rank's command, and submit nothing."""
    requeue: Requeue = Requeue.on_stop
    """When the run goes back into the queue by itself."""
    after: str | None = None
    """Job id, or name of a run beside this one, that must have completed before this one starts."""
    analyze: Analyze = Analyze.never
    """``after`` queues the analysis behind the run, so that one command ends in tables."""
    task: TaskConfig = field(default_factory=TaskConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.cluster.nodes * self.cluster.ranks_per_node

    @property
    def global_batch_size(self) -> int:
        """Images of one optimizer step over all ranks."""
        return self.train.micro_batch_size * self.train.gradient_accumulation_steps * self.world_size
