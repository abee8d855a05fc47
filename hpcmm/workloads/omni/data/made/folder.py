"""Makes the data set's folder: two JSON-lines files, the pictures and sounds that they name, and what chance is.

Nothing in it comes from elsewhere than scikit-image's photographs and espeak-ng. To be right on its held-out part says
that training works; the part has other crops, drawings and voices than the one to train on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.conversations import TEST, TRAIN
from hpcmm.workloads.omni.data.kinds import KINDS_FILE
from hpcmm.workloads.omni.data.made.pictures import Photographs, draw
from hpcmm.workloads.omni.data.made.questions import (
    IMAGE,
    KINDS,
    SOUND,
    Medium,
    Photograph,
    Planner,
    Question,
    Speech,
)
from hpcmm.workloads.omni.data.made.speech import RATE_HZ, Take, find_program, program_version, recording, speak
from hpcmm.workloads.omni.data.sounds import write_sound
from hpcmm.workloads.omni.schema import OmniDataConfig

STAMP = "made.json"
_FORMAT = 1
"""Raise it whenever another data set comes out of the same parameters."""

Conversations = Sequence[Sequence[Question]]
Recorded = Mapping[Take, NDArray[np.float32]]


def made_folder(data: OmniDataConfig, seed: int, cache: Path) -> Path:
    """Where the data set of these parameters belongs; other parameters get another folder."""
    text = json.dumps(_parameters(data, seed), sort_keys=True)
    return cache / f"omni-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def make_folder(folder: Path, data: OmniDataConfig, seed: int) -> None:
    """Make sure that ``folder`` holds the data set of these parameters.

    It is built beside its place and renamed, so that no reader sees half of it, and of several processes that race one
    wins. Raises HpcmmError if espeak-ng or scikit-image is not installed, or something else lies there.
    """
    if _is_there(folder, data, seed):
        return
    find_program()  # before anything is drawn
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    building.mkdir()
    try:
        _write(building, data, seed)
        try:
            building.rename(folder)
        except OSError:
            if not _is_there(folder, data, seed):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _parameters(data: OmniDataConfig, seed: int) -> dict[str, object]:
    names = ("train_examples", "test_examples", "text_words", "text_spread")
    return {"format": _FORMAT, "seed": seed, **{name: getattr(data, name) for name in names}}


def _is_there(folder: Path, data: OmniDataConfig, seed: int) -> bool:
    """Whether ``folder`` holds this very data set; False if it is absent or empty, HpcmmError for all else."""
    stamp = folder / STAMP
    if not stamp.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise HpcmmError(f"{folder} is there already and was not made by this generator; remove it.")
        return False
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HpcmmError(f"{stamp} is damaged; remove its folder, and the data set is made anew.") from error
    if found != _parameters(data, seed):
        raise HpcmmError(f"{folder} holds a data set of other parameters (see {STAMP} there); remove it.")
    return True


def _write(folder: Path, data: OmniDataConfig, seed: int) -> None:
    parts = {
        TRAIN: _plan(data, seed, data.train_examples, held_out=False),
        TEST: _plan(data, seed, data.test_examples, held_out=True),
    }
    media = [medium for part in parts.values() for questions in part for each in questions for medium in each.media]
    takes = dict.fromkeys(take for medium in media if isinstance(medium, Speech) for take in medium.takes)
    recorded = speak(takes, seed, folder)
    for modality in (IMAGE, SOUND):
        (folder / modality).mkdir()
    for name, part in parts.items():
        writer = _Writer(folder, name.partition(".")[0], recorded, seed)
        lines = [json.dumps(writer.conversation(number, each)) for number, each in enumerate(part)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    kinds = {
        name: {"modality": kind.modality, "chance": kind.chance, "answers": kind.answers}
        for name, kind in KINDS.items()
    }
    (folder / KINDS_FILE).write_text(json.dumps(kinds, indent=1) + "\n", encoding="utf-8")
    stamp = {
        "note": "Questions on crops of scikit-image's photographs, drawn shapes, and words that espeak-ng speaks.",
        "parameters": _parameters(data, seed),
        "speech": program_version(find_program()),
    }
    (folder / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def _plan(data: OmniDataConfig, seed: int, count: int, *, held_out: bool) -> Conversations:
    rng = np.random.default_rng([seed, int(held_out)])
    planner = Planner(rng, held_out=held_out, text_words=data.text_words, text_spread=data.text_spread)
    return list(planner.conversations(count))


class _Writer:
    """Writes the files of one part, and says how its conversations name them."""

    def __init__(self, folder: Path, part: str, recorded: Recorded, seed: int) -> None:
        self._folder = folder
        self._part = part
        self._recorded = recorded
        self._seed = [seed, zlib.crc32(part.encode())]
        self._photographs = Photographs()

    def conversation(self, number: int, questions: Sequence[Question]) -> dict[str, Any]:
        """Write the files of conversation ``number``; what its line holds."""
        rng = np.random.default_rng([*self._seed, number])
        turns, files = [], 0
        for question in questions:
            content: list[dict[str, str]] = [{"type": "text", "text": question.text}]
            media = []
            for medium in question.media:
                media.append(self._file(medium, f"{self._part}-{number:06d}-{files}", rng))
                files += 1
            content = media + content if question.media_first else content + media
            turns.append({"role": "user", "content": content})
            turns.append(
                {
                    "role": "assistant",
                    "kind": question.kind,
                    "content": [{"type": "text", "text": question.answer}],
                }
            )
        return {"turns": turns}

    def _file(self, medium: Medium, name: str, rng: np.random.Generator) -> dict[str, str]:
        if isinstance(medium, Speech):
            path = f"{SOUND}/{name}.wav"
            words = [self._recorded[take] for take in medium.takes]
            write_sound(self._folder / path, recording(words, rng), RATE_HZ)
            return {"type": SOUND, "path": path}
        path = f"{IMAGE}/{name}.png"
        if isinstance(medium, Photograph):
            picture = self._photographs.crop(medium.surface, rng, held_out=self._part == TEST.partition(".")[0])
        else:
            picture = draw(medium, rng)
        picture.save(self._folder / path, compress_level=1)
        return {"type": IMAGE, "path": path}
