"""Every key that the omni-modal workload adds to a run, with its type, default, bounds and meaning. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hpcmm.config.keys import PartGroup, key, made_by

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
    num_workers: int = key(0, "Loader processes a rank; 0 reads in the rank's own process.", least=0)
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
        dict, "What a conversation may hold beside text, each a name in ``conf/model/modality/``; null for none."
    )


def data_problems(data: OmniDataConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong between the keys of ``data``."""
    if data.root is None and not data.generate:
        yield "data.root is not given: name the folder of the data set, or have one made with data.generate=true."
