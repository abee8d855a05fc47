"""The noun phrases that describe each category's images, kept in ``captions.json`` beside the category folders.

The file is one JSON object: category to a list of phrases, such as ``{"brick": ["a brick wall"]}``. A phrase says what
the image shows and never whether it has a defect. MVTec-AD has no such file: a category then gets its folder's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcmm.errors import HpcmmError

FILE_NAME = "captions.json"


def write_captions(root: Path, phrases: Mapping[str, Sequence[str]]) -> None:
    """Save each category's phrases under ``root``."""
    text = json.dumps({category: list(texts) for category, texts in phrases.items()}, indent=2)
    (root / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_captions(root: Path, categories: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """At least one phrase for each category. Raises HpcmmError when the file is there but malformed."""
    path = root / FILE_NAME
    saved = _parse(path) if path.is_file() else {}
    return {category: saved.get(category, (_phrase_from_name(category),)) for category in categories}


def _phrase_from_name(category: str) -> str:
    noun = category.replace("_", " ").replace("-", " ")
    return f"{'an' if noun[:1].lower() in set('aeiou') else 'a'} {noun}"


def _parse(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise HpcmmError(f"The caption file {path} cannot be read as JSON: {error}.") from error
    well_formed = isinstance(content, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts)
        for texts in content.values()
    )
    if not well_formed:
        raise HpcmmError(f"The caption file {path} must map each category to a list of one or more phrases.")
    return {category: tuple(texts) for category, texts in content.items()}
