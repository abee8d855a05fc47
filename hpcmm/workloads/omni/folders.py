"""Where a run's conversations, tokenizer and language model lie, and how they get there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpcmm.workloads.omni import data_root
from hpcmm.workloads.omni.schema import LanguageModelKind, ModelConfig, OmniConfig
from hpcmm.workloads.smollm2 import prepare_smollm2, smollm2_folder


def conversations_folder(config: OmniConfig) -> Path:
    """The folder of the conversations to train on and to be scored on."""
    return data_root.data_root(config.data, config.train.seed, config.cluster)


def tokenizer_folder(config: OmniConfig) -> Path:
    """The language model's own tokenizer, or one that is made from the training text for a tiny language model."""
    if config.model.language_model.kind is LanguageModelKind.tiny:
        return data_root.tokenizer_folder(config.data, config.train.seed, config.cluster)
    path = model_config(config).language_model.path
    assert path is not None  # validation asks for it
    return Path(path).expanduser()


def model_config(config: OmniConfig) -> ModelConfig:
    """``model`` with the language model's folder filled in if that is one in the cache.

    Raises HpcmmError if it is not there, since only the preparation of a run makes it.
    """
    language = config.model.language_model
    if language.kind is not LanguageModelKind.smollm2:
        return config.model
    return replace(config.model, language_model=replace(language, path=str(smollm2_folder(config.cluster))))


def prepare(config: OmniConfig) -> None:
    """Make what the run needs and is not there, and say what it trains on and is scored on.

    Raises InputError if a conversation cannot be used.
    """
    data, seed, kind = config.data, config.train.seed, config.model.language_model.kind
    modalities = [name for name, part in config.model.modalities.items() if part is not None]
    data_root.ensure_data(data, seed, config.cluster, modalities)
    if kind is LanguageModelKind.tiny:
        data_root.ensure_made_tokenizer(data, seed, config.cluster)
    if kind is LanguageModelKind.smollm2:
        prepare_smollm2(config.cluster)


def prepare_to_answer(config: OmniConfig) -> None:
    """Make what a trained model needs to answer: conversations only if its tokenizer is made of their text.

    Raises InputError as :func:`prepare` does.
    """
    kind = config.model.language_model.kind
    if kind is LanguageModelKind.tiny:
        prepare(config)
    if kind is LanguageModelKind.smollm2:
        prepare_smollm2(config.cluster)
