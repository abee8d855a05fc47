"""What the page asks for: an upload and a question to a finding, through the batcher, with a line in the log."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.serve.answers import rule_answer
from hpcmm.serve.batcher import Batcher
from hpcmm.serve.drawing import LARGEST_SIDE, jpeg, shrunk
from hpcmm.serve.options import MOST_CAPTION_CHARACTERS, MOST_QUESTION_CHARACTERS, ServeOptions
from hpcmm.serve.predictor import Finding, Predictor, Request
from hpcmm.serve.request_log import RequestLog
from hpcmm.serve.threshold import Threshold
from hpcmm.serve.uploads import Uploaded, open_upload
from hpcmm.workloads.anomaly.data.images import pixels_of
from hpcmm.workloads.anomaly.data.samples import Sample

_DECODERS = 4
"""Images that are decoded at once: each may take a few hundred megabytes."""


@dataclass(frozen=True, slots=True)
class About:
    """The served run, for the page."""

    run: str
    model: str
    checkpoint: str
    is_standin: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out image of the run's data, with the phrase of its category."""

    sample: Sample
    caption: str


@dataclass(frozen=True, slots=True)
class Seen:
    """An image with what was found in it: enough to draw it anew at another threshold."""

    name: str
    picture: bytes
    """JPEG, shrunk for the page."""
    map: NDArray[np.float32]
    score: float
    words: str | None
    """The language model's; None where a rule speaks."""
    note: str

    def answer(self, threshold: float) -> str:
        return rule_answer(self.map, self.score, threshold) if self.words is None else self.words


class Service:
    """The model behind the page. One for all users; close it at the end."""

    def __init__(
        self,
        predictor: Predictor,
        options: ServeOptions,
        *,
        about: About,
        threshold: Threshold,
        log: RequestLog,
        captions: Sequence[str],
        examples: Sequence[Example],
    ) -> None:
        self.options = options
        self.about = about
        self.threshold = threshold
        self.captions = list(captions)
        self.examples = list(examples)
        self.speaks = predictor.speaks
        self._side = predictor.side
        self._log = log
        self._batcher: Batcher[Request, Finding] = Batcher(
            predictor, most=options.max_batch, wait_s=options.max_wait_ms / 1000, waiting=options.max_waiting
        )
        self._decoding: asyncio.Semaphore | None = None

    def close(self) -> None:
        """End the batcher."""
        self._batcher.close()

    async def look(
        self, path: Path | None, name: str, caption: str, question: str | None, *, user: str, kind: str = "image"
    ) -> Seen:
        """Score an uploaded image, and answer the question where the run has a language model.

        Raises HpcmmError with a sentence for the user; the log tells of both outcomes.
        """
        began = time.monotonic()
        fields = {"user": user, "kind": kind, "file": name, "caption": caption, "question": question}
        try:
            seen, uploaded = await self._look(path, name, caption, question)
        except HpcmmError as error:
            self._log.write(**fields, outcome="refused", reason=str(error), seconds=_since(began))
            raise
        except Exception as error:
            self._log.write(**fields, outcome="failed", reason=type(error).__name__, seconds=_since(began))
            raise
        self._log.write(
            **fields,
            outcome="answered",
            bytes=uploaded.file_bytes,
            pixels=list(uploaded.image.size),
            score=round(seen.score, 4),
            words=seen.words,
            seconds=_since(began),
        )
        return seen

    async def _look(self, path: Path | None, name: str, caption: str, question: str | None) -> tuple[Seen, Uploaded]:
        if path is None:
            raise HpcmmError("There is no image yet: upload one, or take an example.")
        phrase = _text(caption, "what the image shows", MOST_CAPTION_CHARACTERS)
        if not phrase:
            raise HpcmmError("Say what the image shows, such as “a brick wall”.")
        asked = None if question is None else _text(question, "the question", MOST_QUESTION_CHARACTERS)
        if self._decoding is None:
            self._decoding = asyncio.Semaphore(_DECODERS)
        async with self._decoding:
            uploaded, pixels, picture = await asyncio.to_thread(self._decoded, path)
        request = Request(pixels, phrase, asked if self.speaks and asked else None)
        found = await asyncio.wrap_future(self._batcher.submit(request))
        if not np.isfinite(found.score):
            raise HpcmmError("The model gave no finite score for this image.")
        return Seen(name, picture, found.map, found.score, found.words or None, uploaded.note), uploaded

    def _decoded(self, path: Path) -> tuple[Uploaded, NDArray[np.float32], bytes]:
        uploaded = open_upload(path, self.options)
        return uploaded, pixels_of(uploaded.image, self._side), jpeg(shrunk(uploaded.image, LARGEST_SIDE))


def as_image(picture: bytes) -> Image.Image:
    """The picture of a :class:`Seen`."""
    return Image.open(io.BytesIO(picture), formats=["JPEG"]).convert("RGB")


def _text(given: object, what: str, most: int) -> str:
    text = given.encode("utf-8", "replace").decode().strip() if isinstance(given, str) else ""
    if len(text) > most:
        raise HpcmmError(f"Of {what}, at most {most} characters are taken; these are {len(text)}.")
    return text


def _since(began: float) -> float:
    return round(time.monotonic() - began, 4)
