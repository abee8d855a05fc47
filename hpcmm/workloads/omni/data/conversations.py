"""Conversations, and the JSON-lines files that hold them beside the files that they name.

A line of ``train.jsonl`` or ``test.jsonl``, without the line breaks::

    {"turns": [
        {"role": "user", "content": [{"type": "image", "path": "images/7.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}], "kind": "animal"}]}

``content`` may be a text alone. A type other than ``text`` is a modality. ``kind`` groups answers that are scored
together. Other keys are left alone.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.files import open_followed
from hpcmm.text import visible

TRAIN, TEST = "train.jsonl", "test.jsonl"
TEXT = "text"
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT)
UNNAMED = "answers"
"""The kind of answers that have none."""

_MOST_BYTES = 1 << 24
"""Of a line; a longer one is no conversation."""
_MOST_TURNS = 512
_LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a turn: a text, or a file of a modality."""

    type: str
    """``text``, or the key of a modality, such as ``image``."""
    text: str = ""
    path: Path | None = None
    prepared: Any = field(default=None, compare=False, repr=False)
    """What the modality's ``read`` gave of a file that was read already."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. ``kind``: of what kind the assistant's answer is, to score it among its like."""

    role: str
    content: tuple[Part, ...]
    kind: str = UNNAMED

    @property
    def text(self) -> str:
        """Its texts, without what lies between them."""
        return "".join(part.text for part in self.content)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in their order. ``origin`` says in messages where it comes from."""

    turns: tuple[Turn, ...]
    origin: str

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(turn.role for turn in self.turns)


class ConversationFile(Sequence[Conversation]):
    """The conversations of a JSON-lines file. Only the places of the lines are kept in memory."""

    def __init__(self, path: Path, modalities: Collection[str] | None) -> None:
        """``modalities``: the types beside ``text`` that can be used; None for any.

        Raises HpcmmError if the file cannot be read, or has no line. What a line holds is seen when it is asked for.
        """
        self.path = path
        self._modalities = modalities
        self._folder = Path(os.path.realpath(path.parent))
        self._starts, self._lines = _places_of(path)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:  # of Sequence's two forms, only that with a number
        """Raises HpcmmError, with file and line, for what is no conversation, and for a file that is not there."""
        start, origin = self._starts[index], f"{visible(str(self.path))}, line {self._lines[index]}"
        try:
            with open_followed(self.path) as file:
                file.seek(start)
                line = file.readline(_MOST_BYTES + 1)
        except OSError as error:
            raise HpcmmError(f"{origin} cannot be read: {error.strerror}.") from error
        try:
            return Conversation(tuple(self._turns(_parsed(line))), origin)
        except _LineError as error:
            raise HpcmmError(f"{origin}: {error}") from error

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def _turns(self, values: Any) -> Iterator[Turn]:
        turns = values.get("turns") if isinstance(values, dict) else None
        if not isinstance(turns, list) or not 1 <= len(turns) <= _MOST_TURNS:
            raise _LineError(f'it must be an object with a list of "turns", 1 to {_MOST_TURNS} of them.')
        for number, turn in enumerate(turns, 1):
            where = f"turn {number}"
            if not isinstance(turn, dict) or turn.get("role") not in ROLES:
                raise _LineError(f'{where} must be an object whose "role" is {_listed(ROLES)}.')
            kind = turn.get("kind", UNNAMED)
            if not isinstance(kind, str) or not kind.isprintable() or not kind:
                raise _LineError(f'the "kind" of {where} must be a printable text.')
            yield Turn(turn["role"], self._content(turn.get("content"), where), kind)
        if not any(turn["role"] == ASSISTANT for turn in turns):
            raise _LineError('no turn has the "role" assistant, so there is nothing to learn from it.')

    def _content(self, content: Any, where: str) -> tuple[Part, ...]:
        if isinstance(content, str):
            content = [{"type": TEXT, "text": content}]
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content) or not content:
            raise _LineError(f'the "content" of {where} must be a text, or a list of objects, one or more.')
        return tuple(self._part(part, where) for part in content)

    def _part(self, part: Mapping[str, Any], where: str) -> Part:
        kind = part.get("type")
        if not isinstance(kind, str):
            raise _LineError(f'a part of {where} has no "type".')
        if kind == TEXT:
            if not isinstance(part.get("text"), str):
                raise _LineError(f'a text of {where} has no "text".')
            if any("\ud800" <= each <= "\udfff" for each in part["text"]):
                raise _LineError(f"a text of {where} holds half of a character (a lone surrogate).")
            return Part(TEXT, part["text"])
        if self._modalities is not None and kind not in self._modalities:
            known = _listed((TEXT, *sorted(self._modalities)))
            raise _LineError(f'{where} has a part of "type" {_shown(kind)}, but the model takes {known}.')
        return Part(kind, path=self._file(part.get("path"), f"the {_shown(kind)} of {where}"))

    def _file(self, name: Any, what: str) -> Path:
        """What ``name`` means in the data folder. Raises _LineError if it lies elsewhere or nowhere."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise _LineError(f'{what} has no "path".')
        given = PurePosixPath(name)
        path = self._folder / given
        if given.is_absolute() or ".." in given.parts or not _is_within(path, self._folder):
            raise _LineError(f"{what} is {_shown(name)}, which leaves the data folder: name a file in it.")
        if not _is_there(path):
            raise _LineError(f"{what} is {_shown(name)}, which is not there, or is no file.")
        return path


class _LineError(Exception):
    """What is wrong with a line, as the end of a sentence."""


def _places_of(path: Path) -> tuple[array[int], array[int]]:
    """Where each line that is not empty begins, in bytes, and its number from 1 on; 8 bytes each."""
    starts, numbers, place = array("q"), array("q"), 0
    try:
        with open_followed(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MOST_BYTES), b""), 1):
                if not line.endswith(b"\n") and len(line) == _MOST_BYTES:
                    raise HpcmmError(
                        f"{visible(str(path))}, line {number}: it has more than {_MOST_BYTES >> 20} MiB, so it is no "
                        "conversation; write one a line."
                    )
                if line.strip():
                    starts.append(place)
                    numbers.append(number)
                place += len(line)
    except OSError as error:
        raise HpcmmError(
            f"{visible(str(path))} cannot be read: {error.strerror}. A data folder has {TRAIN} and {TEST}."
        ) from error
    if not starts:
        raise HpcmmError(f"{visible(str(path))} holds no conversation; write one a line, as JSON.")
    return starts, numbers


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _LineError(f"it is not JSON: {error.msg} at character {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of too many digits, lists within lists
        raise _LineError(f"it is not JSON that can be read: {_shown(str(error))}.") from error


def _is_within(path: Path, folder: Path) -> bool:
    """Whether what ``path`` means, links followed, lies in ``folder``, a real path."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(folder)
    except OSError:
        return False


def _is_there(path: Path) -> bool:
    """Whether it is a file or a folder; a name that is too long, or that must not be looked up, is none."""
    try:
        return path.is_file() or path.is_dir()
    except OSError:
        return False


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(text: str) -> str:
    return visible(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")
