"""Where a run's conversations, tokenizer and language model lie, and how they get there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpcmm.errors import HpcmmError, InputError
from hpcmm.node.cache import cache_dir, data_dir
from hpcmm.workloads.omni.schema import LanguageModelKind, ModelConfig, OmniConfig
from hpcmm.workloads.smollm2 import prepare_smollm2, smollm2_folder


def data_root(config: OmniConfig) -> Path:
    """The conversations: ``data.root``, or the folder in the cache of those that are made."""
    from hpcmm.workloads.omni.data.made.folder import made_folder  # noqa: PLC0415 -- imports SciPy

    if config.data.root is not None:
        return Path(config.data.root).expanduser()
    return made_folder(config.data, config.train.seed, data_dir(config.cluster))


def tokenizer_folder(config: OmniConfig) -> Path:
    """The language model's own tokenizer, or one that is made from the training text for a tiny language model."""
    from hpcmm.workloads.omni.data.tokenizer import made_tokenizer_folder  # noqa: PLC0415

    if config.model.language_model.kind is LanguageModelKind.tiny:
        return made_tokenizer_folder(data_root(config), config.data.vocabulary, cache_dir(config.cluster))
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

    Raises InputError if the conversations cannot be read.
    """
    from hpcmm.workloads.omni.data.conversations import TEST, TRAIN, ConversationFile  # noqa: PLC0415
    from hpcmm.workloads.omni.data.made.folder import make_folder  # noqa: PLC0415
    from hpcmm.workloads.omni.data.tokenizer import ensure_tokenizer  # noqa: PLC0415

    root, language = data_root(config), config.model.language_model
    if config.data.root is None:
        if not root.exists():
            print(f"Making conversations, pictures and speech in {root}.", flush=True)
        make_folder(root, config.data, config.train.seed)
    if language.kind is LanguageModelKind.smollm2:
        prepare_smollm2(config.cluster)
    try:
        counts = [len(ConversationFile(root / name, None)) for name in (TRAIN, TEST)]
        if language.kind is LanguageModelKind.tiny:
            ensure_tokenizer(tokenizer_folder(config), root, config.data.vocabulary)
    except HpcmmError as error:
        raise InputError(str(error)) from error
    print(f"To train on: {counts[0]} conversations in {root}. To be scored on: {counts[1]}.", flush=True)
