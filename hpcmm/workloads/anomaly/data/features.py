"""What a frozen image encoder made of images, kept in files: computed once, read by any rank of any later run.

A folder belongs to one encoder and one data set as they are (:mod:`hpcmm.workloads.anomaly.feature_cache` hashes
both), and holds a file an item. A file is written beside and renamed, so it is whole or not there; it is safetensors,
which runs no code, with a checksum of its tensors, which that format lacks.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.utils.data import Dataset

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.anomaly import Item
from hpcmm.workloads.anomaly.question_answering.conversations import Dialogue

_HEADER = 8
"""Bytes that tell the length of a safetensors file's header."""
_CHECKSUM, _FACTS = "crc32", "item"
_FOLDERS = 256
"""The files are spread over that many folders."""


class FeatureStore:
    """The items of one encoder and data set, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, number: int, item: Item, maps: list[Tensor]) -> None:
        """Keep ``item`` with ``maps`` (channels, h, w) in place of its image. Raises HpcmmError if there is no
        room."""
        path = self._path(number)
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        tensors = {f"map_{level}": each.detach().cpu().contiguous() for level, each in enumerate(maps)}
        tensors["mask"] = item["mask"] > 0.5
        facts = {name: value for name, value in item.items() if not isinstance(value, Tensor)}
        metadata = {_FACTS: json.dumps(facts), _CHECKSUM: _checksum(tensors)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, metadata)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise HpcmmError(
                f"The feature file {path} cannot be written: {error}. Make room there, set cluster.cache_dir to "
                "another folder, or train with data.feature_cache=false."
            ) from error

    def read(self, number: int) -> Item:
        """The item, with ``features`` and without ``image``. Raises HpcmmError if its file is missing or damaged."""
        path = self._path(number)
        try:
            item = _read(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise HpcmmError(
                f"The feature file {path} is missing or damaged ({error}): start the run again, which computes it anew."
            ) from error
        return item

    def lacking(self, numbers: Iterable[int]) -> list[int]:
        """Those whose file is not there or is damaged."""
        return [number for number in numbers if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        try:
            self.read(number)
        except HpcmmError:
            return False
        return True

    def _path(self, number: int) -> Path:
        return self.folder / f"{number % _FOLDERS:02x}" / f"{number:07d}.safetensors"


class KeptItems(Dataset[Item]):
    """A data set's items from a store, if they all are: item ``epoch * length + i`` is kept as one of
    ``variants``."""

    def __init__(self, store: FeatureStore, length: int, variants: int = 1) -> None:
        self._store = store
        self._length = length
        self._variants = variants

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        """Raises HpcmmError if the item's file is missing or damaged."""
        return self._store.read(self.number(index))

    def number(self, index: int) -> int:
        """The kept item's number."""
        epoch, index = divmod(index, self._length)
        return epoch % self._variants * self._length + index


def _read(path: Path) -> Item:
    content = path.read_bytes()  # no mapping: a file that another process cuts short would end this one
    tensors = load(content)
    header = json.loads(content[_HEADER : _HEADER + int.from_bytes(content[:_HEADER], "little")])
    metadata = header["__metadata__"]
    if metadata[_CHECKSUM] != _checksum(tensors):
        raise ValueError("wrong checksum")
    facts: dict[str, Any] = json.loads(metadata[_FACTS])
    mask = tensors.pop("mask").float()
    question, answer = facts["dialogue"]
    return Item(
        features=[tensors[f"map_{level}"] for level in range(len(tensors))],
        mask=mask,
        label=int(facts["label"]),
        caption=str(facts["caption"]),
        category=str(facts["category"]),
        dialogue=Dialogue(str(question), str(answer)),
        index=int(facts["index"]),
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
