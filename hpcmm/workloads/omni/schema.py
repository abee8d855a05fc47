"""Every key that the omni-modal workload adds to a run, with its type, default, bounds and meaning. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hpcmm.config.keys import PartGroup, key, made_by
from hpcmm.config.parts import class_attribute, folders_of, options_of, part_name
from hpcmm.config.schema import RunConfig, TaskConfig, TrainConfig

ARCHITECTURES = ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Language models that fit, by the ``model_type`` of ``transformers``."""
WITH_EXPERTS = ("mixtral", "qwen3_moe")
_NAME = re.compile("[a-z][a-z0-9_]*")

MODALITY = PartGroup("model/modality", "hpcmm.workloads.omni.models.modalities.modality.Modality", given=("width",))


class OnError(StrEnum):
    """What becomes of a conversation that cannot be used."""

    refuse = "refuse"
    skip = "skip"


@dataclass
class OmniDataConfig:
    """Conversations in which text, images and sounds are mixed."""

    root: str | None = key(
        None,
        "Folder with ``train.jsonl``, ``test.jsonl`` and the files that they name. None: a data set that is made in "
        "``cluster.cache_dir``.",
    )
    generate: bool = key(
        True, "Make the data set if it is needed and not there. A folder that ``root`` names is never written to."
    )
    train_examples: int = key(2400, "Conversations to train on; of the data set that is made.", least=1)
    test_examples: int = key(720, "Conversations to be scored on; of the data set that is made.", least=1)
    text_words: float = key(
        8.0,
        "Median number of words that stand around a question, drawn from a lognormal distribution; of the data set "
        "that is made.",
        above=0,
    )
    text_spread: float = key(0.8, "Standard deviation of the logarithm of that number.", least=0, most=3)
    max_tokens: int = key(
        2048, "Most tokens of a conversation, images and sounds included; a longer one cannot be used.", least=2
    )
    packed: bool = key(
        True,
        "Put the conversations of a micro-batch one behind the other. False pads each to the longest of them, to "
        "measure what that costs.",
    )
    on_error: OnError = key(
        OnError.refuse,
        "A conversation with a file that cannot be read, or that is longer than ``max_tokens``: ``refuse`` ends the "
        "run, ``skip`` warns, takes the next one in training, and leaves it out of the scores.",
    )
    vocabulary: int = key(
        1024,
        "Most tokens of the tokenizer that is made from the training text, for a language model that has none.",
        least=300,
    )
    num_workers: int = key(0, "Loader processes a rank; 0 reads in the rank's own process.", least=0, most=256)
    prefetch_batches: int = key(2, "Micro-batches that each loader process makes ahead.", least=1)


class LanguageModelKind(StrEnum):
    """Where the language model comes from."""

    smollm2 = "smollm2"
    """SmolLM2-135M-Instruct, whose weights an installed package holds; converted once into the cache folder."""
    folder = "folder"
    """A ``transformers`` folder that the site has."""
    tiny = "tiny"
    """A small random network of ``architecture``."""


@dataclass
class TinyConfig:
    """Sizes of a tiny language model."""

    layers: int = key(2, least=1)
    width: int = key(64, "Length of a token's embedding.", least=1)
    heads: int = key(4, least=1)
    kv_heads: int = key(2, "Heads of keys and values, each of which several heads share.", least=1)
    intermediate: int = key(128, "Hidden width of each layer's perceptron, or of each expert.", least=1)
    experts: int = key(4, "Of each layer, in an architecture with experts.", least=1)
    experts_per_token: int = key(2, least=1)
    router_loss: bool = key(False, "Add the loss of experts that are chosen unevenly, as config.json may ask for.")
    longest: int = key(2048, "Tokens of an example at most.", least=1)


@dataclass
class LanguageModelConfig:
    """The causal language model."""

    kind: LanguageModelKind = key(LanguageModelKind.tiny, "``smollm2``, ``folder`` or ``tiny``.")
    path: str | None = key(None, "Folder with ``config.json``, tokenizer and ``.safetensors``; for ``kind=folder``.")
    architecture: str = key("llama", "Of ``kind=tiny``: llama, mixtral, qwen2, qwen3 or qwen3_moe.")
    tiny: TinyConfig = made_by(TinyConfig)
    frozen: bool = key(False, "Whether the model's own weights stay as they are; LoRA trains all the same.")
    lora_rank: int = key(0, "Rank of the low-rank updates (LoRA) of ``lora_targets``; 0 for none.", least=0)
    lora_alpha: float = key(16.0, "The updates are multiplied by lora_alpha / lora_rank.", above=0)
    lora_dropout: float = key(0.0, least=0, most=1)
    lora_targets: list[str] = made_by(
        lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], "The linear maps of each layer that get an update."
    )


@dataclass
class ModelConfig:
    """Language model and modalities."""

    language_model: LanguageModelConfig = made_by(LanguageModelConfig)
    modalities: dict[str, Any] = made_by(
        dict,
        "What a conversation may hold beside text, each a name in ``conf/model/modality/``; null for none.",
        parts=MODALITY,
    )


@dataclass
class OmniTrainConfig(TrainConfig):
    """The optimisation: the cross-entropy of the answers' tokens, each of which counts the same."""

    encoder_learning_rate: float | None = key(
        None, "That of the modalities' encoders; None: ``learning_rate``.", above=0
    )
    connector_learning_rate: float | None = key(
        None, "That of the modalities' connectors; None: ``learning_rate``.", above=0
    )


def _task() -> TaskConfig:
    return TaskConfig("omni", "hpcmm.workloads.omni.workload.OmniWorkload")


@dataclass
class OmniConfig(RunConfig):
    """A run of the omni-modal language model."""

    task: TaskConfig = made_by(_task)
    model: ModelConfig = made_by(ModelConfig)
    data: OmniDataConfig = made_by(OmniDataConfig)
    train: OmniTrainConfig = made_by(OmniTrainConfig)


def problems(config: OmniConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong between the keys that this workload adds."""
    yield from _language_problems(config.model.language_model)
    yield from _modality_problems(config)
    yield from data_problems(config.data)


def _language_problems(language: LanguageModelConfig) -> Iterator[str]:
    where, tiny = "model.language_model", language.tiny
    if language.kind is LanguageModelKind.folder and not language.path:
        yield f"{where}.path is not given: name the folder of the language model, or take model=omni_tiny."
    if language.kind is not LanguageModelKind.tiny:
        return
    if language.architecture not in ARCHITECTURES:
        yield f"{where}.architecture is {language.architecture!r}, but must be {' or '.join(ARCHITECTURES)}."
    if tiny.heads % tiny.kv_heads:
        yield f"{where}.tiny.heads is {tiny.heads}, but must be a multiple of kv_heads, {tiny.kv_heads}."
    if tiny.width % (2 * tiny.heads):
        yield f"{where}.tiny.width is {tiny.width}, but must be a multiple of twice the heads, {2 * tiny.heads}."
    if tiny.experts_per_token > tiny.experts:
        yield f"{where}.tiny.experts_per_token is {tiny.experts_per_token}, but there are {tiny.experts} experts."


def _modality_problems(config: OmniConfig) -> Iterator[str]:
    for name, part in config.model.modalities.items():
        where = f"model.modalities.{name}"
        if not _NAME.fullmatch(name) or name == "text":
            yield f"{where}: a modality is called by small letters, digits and _, and not text: give it another name."
        if isinstance(part, Mapping) and part.get("weights") is None and class_attribute(part, "needs_weights"):
            tiny = f"{part_name(part)}_tiny"
            known = tiny in options_of(MODALITY.group, folders_of(config.launch.config_dir))
            otherwise = f", or take a small random one with {where}={tiny}" if known else ""
            yield f"{where}.weights is not given, but {part_name(part)} needs its folder: name it{otherwise}."


def data_problems(data: OmniDataConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong between the keys of ``data``."""
    if data.root is None and not data.generate:
        yield "data.root is not given: name the folder of the data set, or have one made with data.generate=true."
