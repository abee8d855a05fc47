"""Every key that the anomaly detector adds to a run, with its type, default, bounds and meaning. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hpcmm.config.keys import PartGroup, key, made_by
from hpcmm.config.parts import class_attribute, folders_of, options_of, part_name
from hpcmm.config.schema import RunConfig, TaskConfig, TrainConfig

_MODELS = "hpcmm.workloads.anomaly.models"

IMAGE_ENCODER = PartGroup(
    "model/image_encoder", f"{_MODELS}.image_encoders.encoder.ImageEncoder", given=("weights", "taps", "frozen")
)
TEXT_TOWER = PartGroup(
    "model/text_tower", f"{_MODELS}.text_encoders.encoder.TextEncoder", given=("folder", "image_weights")
)
DECODER = PartGroup("model/decoder", f"{_MODELS}.decoders.decoder.Decoder", given=("channels", "width"))


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


@dataclass
class DataConfig:
    """Images in MVTec-AD's or VisA's folder layout, and the text that goes with them."""

    layout: Layout = key(Layout.mvtec, "``mvtec`` or ``visa``.")
    root: str | None = key(
        None, "Folder with one sub-folder a category. None: the stand-ins, in ``cluster.cache_dir``."
    )
    standins: Standins = key(Standins.surfaces, "Which stand-ins, where ``root`` is None.")
    test_root: str | None = key(
        None,
        "Another data set to score on, such as MVTec-AD after training on VisA. None: the test images of ``root``.",
    )
    test_standins: Standins | None = key(
        None, "Other stand-ins to score on, if both ``root`` and ``test_root`` are None."
    )
    test_layout: Layout | None = key(None, "Layout of ``test_root``; None: ``layout``.")
    test_categories: list[str] = made_by(
        list, "Categories of ``test_root`` or ``test_standins`` to use; empty for all."
    )
    shots: int | None = key(None, "Normal images a category to train on, drawn by the seed; None for all.", least=1)
    on_error: OnError = key(
        OnError.refuse,
        "An unreadable image, or a mask of another size than its image: ``refuse`` ends the run, ``skip`` warns, "
        "takes the next image in training, and leaves it out of the scores.",
    )
    generate: bool = key(
        False,
        "Make the stand-ins if they are needed and not there. A folder that ``root`` names is never written to.",
    )
    categories: list[str] = made_by(list, "Categories to use; empty for all that lie under ``root``.")
    image_size: int = key(128, "Side of the square images that the model sees, in pixels.", least=1)
    train_images_per_category: int = key(24)
    test_images_per_category: int = key(20, "Half of them with a defect. Both counts are for the generator only.")
    anomaly_probability: float = key(0.5, "Share of the training images that get a simulated defect.", least=0, most=1)
    anomaly_kinds: list[AnomalyKind] = made_by(
        lambda: list(AnomalyKind),
        "Kinds of simulated defects, each as likely: ``perlin``, ``rectangle``, ``cut_paste``.",
    )
    num_workers: int = key(0, "Loader processes a rank; 0 decodes in the rank's own process.", least=0, most=256)
    prefetch_batches: int = key(2, "Micro-batches that each loader process makes ahead.", least=1)
    feature_cache: bool = key(
        False,
        "Compute the frozen image encoder's features before training, once for all runs, and keep them in "
        "``cluster.cache_dir``. What happens to an image is then drawn ``feature_variants`` times, and repeats "
        "after that.",
    )
    feature_variants: int = key(
        4,
        "How many ways a training image is changed (augmentation, simulated anomaly) with ``feature_cache``.",
        least=1,
    )
    slow_rank: int | None = key(None, "Rank whose loading is made slow, to learn what a straggler looks like.")
    slow_s: float = key(0.0, "Seconds added to each batch of ``slow_rank``.", least=0)


@dataclass
class LlmConfig:
    """The language model that says whether and where there is an anomaly."""

    kind: LlmKind = key(LlmKind.none)
    path: str | None = key(None, "Folder with ``config.json``, tokenizer and ``.safetensors``; for ``kind=folder``.")
    frozen: bool = key(
        True, "Whether the model's own weights stay as they are; the prompts, and LoRA, train all the same."
    )
    lora_rank: int = key(8, "Rank of the low-rank updates (LoRA) of ``lora_targets``; 0 for none.", least=0)
    lora_alpha: float = key(16.0, "The updates are multiplied by lora_alpha / lora_rank.", above=0)
    lora_dropout: float = key(0.0)
    lora_targets: list[str] = made_by(
        lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], "The linear maps of each layer that get an update."
    )
    human_turn: str = key(
        "### Human: ",
        "What stands between the first token and a question's image, in the words that the model was tuned on.",
    )
    assistant_turn: str = key("\n### Assistant: ", "What stands between a question and its answer.")
    max_question_tokens: int = key(96, "A longer question is cut.", least=1)
    max_answer_tokens: int = key(32, "Most tokens of an answer.", least=1)


@dataclass
class ModelConfig:
    """Encoders, decoder and language model of the anomaly detector."""

    image_encoder: Any = key(
        "efficientnet_lite0", "The image encoder: a name in ``conf/model/image_encoder/``.", part=IMAGE_ENCODER
    )
    image_weights: str | None = key(
        None,
        "The image encoder's weights: a file with a state dict (EfficientNet-Lite0, ImageBind) or a "
        "``transformers`` folder (CLIP, ViT). None: those that the installed package ships, for "
        "EfficientNet-Lite0 alone.",
    )
    image_taps: list[int] = made_by(
        list,
        "Blocks of a vision transformer, from 0 on, whose patch features the decoder gets; empty: four, evenly spread.",
    )
    text_tower: Any = key(
        "sentence",
        "The text encoder: a name in ``conf/model/text_tower/``; ``clip`` and ``imagebind`` share a space with the "
        "image encoder.",
        part=TEXT_TOWER,
    )
    text_encoder: str | None = key(
        None,
        "Folder of a ``transformers`` text encoder. None: for ``sentence`` the MiniLM that the installed package "
        "ships, for ``clip`` the folder of ``image_weights``, for ``imagebind``, of which it gives the tokenizer,"
        " the folder that ``image_weights`` lies in.",
    )
    freeze_image_encoder: bool = key(True, "The text encoder is always frozen.")
    decoder: Any = key("fcn", "The decoder: a name in ``conf/model/decoder/``.", part=DECODER)
    decoder_width: int = key(256, "Channels of the decoder's feature maps.", least=1)
    text_adapter_width: int = key(
        2048, "Hidden width of the network that adapts text embeddings to the patch features.", least=1
    )
    temperature: float = key(0.07, "Divides the cosine similarity of patch and text.", above=0)
    llm: LlmConfig = made_by(LlmConfig)


@dataclass
class AnomalyTrainConfig(TrainConfig):
    """The optimisation: focal and dice loss on maps, and cross-entropy on answers."""

    words_learning_rate: float | None = key(
        None, "That of prompts and language model; None: ``learning_rate``.", above=0
    )
    focal_gamma: float = key(2.0, least=0)
    focal_alpha: float = key(
        0.75, "Weight of abnormal pixels in the focal loss; normal ones have 1 - focal_alpha.", least=0, most=1
    )
    focal_weight: float = key(5.0, least=0)
    dice_weight: float = key(1.0, least=0)
    text_weight: float = key(
        1.0, "Weight of the cross-entropy of the answers' tokens; of no effect without a language model.", least=0
    )


def _task() -> TaskConfig:
    return TaskConfig("anomaly", "hpcmm.workloads.anomaly.workload.AnomalyWorkload")


@dataclass
class AnomalyConfig(RunConfig):
    """A run of the anomaly detector."""

    task: TaskConfig = made_by(_task)
    model: ModelConfig = made_by(ModelConfig)
    data: DataConfig = made_by(DataConfig)
    train: AnomalyTrainConfig = made_by(AnomalyTrainConfig)


def problems(config: AnomalyConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong between the keys that this workload adds."""
    yield from _model_problems(config)
    yield from _data_problems(config)
    if config.parallel.activation_checkpointing:
        yield (
            "parallel.activation_checkpointing is true, but the detector has no layers that compute their activations "
            "again: leave it out. A smaller train.micro_batch_size saves memory, too."
        )


def _model_problems(config: AnomalyConfig) -> Iterator[str]:
    model, encoder = config.model, config.model.image_encoder
    if isinstance(encoder, Mapping) and model.image_weights is None and class_attribute(encoder, "needs_weights"):
        name = part_name(encoder)
        tiny = f"{name}_tiny" in options_of(IMAGE_ENCODER.group, folders_of(config.launch.config_dir))
        otherwise = f"or take a small random one of the same kind with model={name}_tiny" if tiny else "or take another"
        yield (
            f"model.image_weights is not given, but {name} needs the folder or file of its weights: "
            f"name it, {otherwise}."
        )
    if model.llm.kind is LlmKind.folder and not model.llm.path:
        yield "model.llm.path is not given, but model.llm.kind=folder needs the folder of the language model: name it."


def _data_problems(config: AnomalyConfig) -> Iterator[str]:
    data = config.data
    if data.root is None and not data.generate:
        yield "data.root is not given: name the folder of the data set, or make stand-ins with data.generate=true."
    if data.test_standins is not None and (data.root is None) != (data.test_root is None):
        yield (
            "One of data.root and data.test_root is given and the other would be stand-ins: "
            "give both, to train and score on real data sets, or neither."
        )
    if data.slow_rank is not None and not 0 <= data.slow_rank < config.world_size:
        yield f"data.slow_rank is {data.slow_rank}, but the ranks are 0 to {config.world_size - 1}."
    if data.feature_cache and not config.model.freeze_image_encoder:
        yield "data.feature_cache keeps what a frozen encoder gives: set model.freeze_image_encoder=true."
    if not data.anomaly_kinds:
        yield "data.anomaly_kinds is empty: name kinds, or set data.anomaly_probability=0."
