"""Where a run's conversations lie, and the tokenizer that is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from hpcmm.config.schema import ClusterConfig
from hpcmm.errors import HpcmmError, InputError
from hpcmm.node.cache import data_dir
from hpcmm.workloads.omni.data.conversations import TEST, TRAIN, ConversationFile
from hpcmm.workloads.omni.data.kinds import read_kinds
from hpcmm.workloads.omni.data.made.folder import made_folder, make_folder
from hpcmm.workloads.omni.data.tokenizer import ensure_tokenizer, made_tokenizer_folder
from hpcmm.workloads.omni.schema import OmniDataConfig, OnError

_CHECKED = 20_000
"""Conversations of a file that are looked through before a run; more would take minutes on a shared file system."""


def data_root(data: OmniDataConfig, seed: int, cluster: ClusterConfig) -> Path:
    """The data folder: ``data.root``, or that of the data set that is made, in the cache."""
    if data.root is not None:
        return Path(data.root).expanduser()
    return made_folder(data, seed, data_dir(cluster))


def ensure_data(data: OmniDataConfig, seed: int, cluster: ClusterConfig, modalities: Collection[str]) -> None:
    """Make the data set if the run needs it and it is not there, and say what is trained on and what is scored.

    ``modalities``: the content types beside text that the model takes. Raises InputError if a conversation cannot be
    used, unless ``data.on_error`` skips it.
    """
    root = data_root(data, seed, cluster)
    if data.root is None and data.generate:
        if not root.exists():
            print(f"Making the data set in {root}.", flush=True)
        make_folder(root, data, seed)
    try:
        lines = [_contents(root / name, what, modalities, data.on_error) for name, what in _USES.items()]
        read_kinds(root)
    except HpcmmError as error:
        raise InputError(str(error)) from error
    print("\n".join(lines), flush=True)


def tokenizer_folder(data: OmniDataConfig, seed: int, cluster: ClusterConfig) -> Path:
    """The folder of the tokenizer that is made from the training text, in the cache, for models that have none."""
    return made_tokenizer_folder(data_root(data, seed, cluster), data.vocabulary, data_dir(cluster))


def ensure_made_tokenizer(data: OmniDataConfig, seed: int, cluster: ClusterConfig) -> None:
    """Make that tokenizer if it is not there. Raises InputError if the training text cannot be read."""
    try:
        folder = tokenizer_folder(data, seed, cluster)
        ensure_tokenizer(folder, data_root(data, seed, cluster), data.vocabulary)
    except HpcmmError as error:
        raise InputError(str(error)) from error


_USES = {TRAIN: "To train on", TEST: "To be scored on"}


def _contents(path: Path, what: str, modalities: Collection[str], on_error: OnError) -> str:
    """What a file of conversations holds, as a line. Raises HpcmmError for one that cannot be used."""
    conversations = ConversationFile(path, modalities)
    checked, unusable, parts = min(len(conversations), _CHECKED), 0, Counter[str]()
    for index in range(checked):
        try:
            parts.update({part.type for turn in conversations[index].turns for part in turn.content})
        except HpcmmError as error:
            if on_error is OnError.refuse:
                raise
            unusable += 1
            print(f"{error} It is left out, as data.on_error says.", flush=True)
    looked = "" if checked == len(conversations) else f" of the first {checked}"
    counts = "".join(f", {parts[kind]}{looked} with {kind}s" for kind in sorted(modalities))
    left_out = f"; {unusable}{looked} cannot be used" if unusable else ""
    return f"{what}: {len(conversations)} conversations{counts}, in {path}{left_out}."
