"""Tokenizers: of a model's own folder, or a small one that is made from the training text."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.text import visible
from hpcmm.workloads.omni.data.conversations import ROLES, TEXT, TRAIN, ConversationFile

_END = "<|end|>"
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}" + _END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_FORMAT = 1
"""Raise it whenever another tokenizer comes out of the same text."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a ``transformers`` folder, which runs no code of that folder. Raises HpcmmError if it cannot."""
    if not folder.is_dir():
        raise HpcmmError(f"{visible(str(folder))} is not a folder; name the one with the tokenizer's files.")
    from hpcmm.workloads import pretrained  # noqa: PLC0415 -- imports torch

    return pretrained.load_tokenizer(folder, "the language model", "model.language_model.path")


def made_tokenizer_folder(root: Path, vocabulary: int, cache: Path) -> Path:
    """Where the tokenizer that is made from a data folder's training text belongs.

    Raises HpcmmError if the text cannot be read.
    """
    try:
        with (root / TRAIN).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise HpcmmError(f"{visible(str(root / TRAIN))} cannot be read: {error.strerror}.") from error
    digest.update(f" {vocabulary} {_FORMAT}".encode())
    return cache / f"omni-tokenizer-{digest.hexdigest()[:12]}"


def ensure_tokenizer(folder: Path, root: Path, vocabulary: int) -> None:
    """Make sure that ``folder`` holds the tokenizer of the training text of the data folder ``root``.

    It is built beside its place and renamed, so that no reader sees half of it.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        make_tokenizer(_texts(ConversationFile(root / TRAIN, None)), vocabulary).save_pretrained(building)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A tokenizer of at most ``vocabulary`` tokens that can write any text, with a chat template.

    Byte-level byte-pair encoding: all 256 bytes, and what is most frequent in ``texts``.
    Source: R. Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", ACL 2016.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 -- as above
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    special = [_END, *(f"<|{role}|>" for role in ROLES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_END,
        additional_special_tokens=special[1:],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts(conversations: ConversationFile) -> Iterator[str]:
    """Each text of each conversation that can be read; the others are reported where the data are checked."""
    for index in range(len(conversations)):
        with suppress(HpcmmError):
            turns = conversations[index].turns
            yield from [part.text for turn in turns for part in turn.content if part.type == TEXT]
