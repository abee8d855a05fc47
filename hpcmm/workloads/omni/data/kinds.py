"""``kinds.json`` of a data folder: what each kind of answer is on, and how often one is right by chance. Optional.

One JSON object, such as ``{"digit": {"modality": "sound", "chance": 0.1}}``; other keys of a kind are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.text import visible

KINDS_FILE = "kinds.json"


@dataclass(frozen=True, slots=True)
class AnswerKind:
    """What ``kinds.json`` says of a kind of answer; None of what it does not say."""

    modality: str | None = None
    """The content type that one must have seen or heard to answer."""
    chance: float | None = None
    """The accuracy without it, from 0 to 1."""


def read_kinds(folder: Path) -> Mapping[str, AnswerKind]:
    """The kinds that the data folder describes; none if it has no such file. Raises HpcmmError if it is malformed."""
    path = folder / KINDS_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HpcmmError(f"{visible(str(path))} cannot be read as JSON: {visible(str(error))}.") from error
    if not isinstance(content, dict) or not all(_is_kind(each) for each in content.values()):
        raise HpcmmError(
            f"{visible(str(path))} must be an object that has, for each kind, an object with "
            '"modality" (a text) and "chance" (a number from 0 to 1), or one of them.'
        )
    return {name: AnswerKind(each.get("modality"), each.get("chance")) for name, each in content.items()}


def _is_kind(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    modality, chance = value.get("modality"), value.get("chance")
    is_number = isinstance(chance, (int, float)) and not isinstance(chance, bool) and 0 <= chance <= 1
    return (modality is None or isinstance(modality, str)) and (chance is None or is_number)
