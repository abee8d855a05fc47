"""What the page asks for: an upload and a question to a finding, through the server's batcher and log."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.serve.served import typed
from hpcmm.serve.service import Service
from hpcmm.serve.uploads import Uploaded, jpeg, open_upload, shrunk
from hpcmm.workloads.anomaly.data.images import pixels_of
from hpcmm.workloads.anomaly.page.drawing import LARGEST_SIDE
from hpcmm.workloads.anomaly.page.predictor import Finding, Request
from hpcmm.workloads.anomaly.question_answering.grid import CELL_NAMES, defect_cells

MOST_QUESTION_CHARACTERS = 300
MOST_CAPTION_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Seen:
    """An image with what was found in it: enough to draw it anew at another threshold."""

    name: str
    picture: bytes
    """JPEG, shrunk for the page."""
    map: NDArray[np.float32]
    score: float
    words: str | None
    """The language model's; None if a rule speaks."""
    note: str

    def answer(self, threshold: float) -> str:
        return rule_answer(self.map, self.score, threshold) if self.words is None else self.words


class Inspector:
    """Looks at uploaded images for all users. ``side`` is that of the images that the model sees, in pixels."""

    def __init__(self, service: Service[Request, Finding], side: int, *, speaks: bool) -> None:
        self._service = service
        self._side = side
        self._speaks = speaks

    async def look(
        self, path: Path | None, name: str, caption: str, question: str | None, *, user: str, kind: str = "image"
    ) -> Seen:
        """Score an uploaded image, and answer the question if the run has a language model.

        Raises HpcmmError with a sentence for the user; the log tells of both outcomes.
        """
        fields = {"user": user, "kind": kind, "file": name, "caption": caption, "question": question}
        return await self._service.logged(self._look(path, name, caption, question), **fields)

    async def _look(
        self, path: Path | None, name: str, caption: str, question: str | None
    ) -> tuple[Seen, dict[str, Any]]:
        if path is None:
            raise HpcmmError("There is no image yet: upload one, or take an example.")
        phrase = typed(caption, "what the image shows", MOST_CAPTION_CHARACTERS)
        if not phrase:
            raise HpcmmError("Say what the image shows, such as “a brick wall”.")
        asked = None if question is None else typed(question, "the question", MOST_QUESTION_CHARACTERS)
        uploaded, pixels, picture = await self._service.prepared(lambda: self._decoded(path))
        found = await self._service.ask(Request(pixels, phrase, asked if self._speaks and asked else None))
        if not np.isfinite(found.score):
            raise HpcmmError("The model gave no finite score for this image.")
        seen = Seen(name, picture, found.map, found.score, found.words or None, uploaded.note)
        size = {"bytes": uploaded.file_bytes, "pixels": list(uploaded.image.size)}
        return seen, {**size, "score": round(seen.score, 4), "words": seen.words}

    def _decoded(self, path: Path) -> tuple[Uploaded, NDArray[np.float32], bytes]:
        uploaded = open_upload(path, self._service.options)
        return uploaded, pixels_of(uploaded.image, self._side), jpeg(shrunk(uploaded.image, LARGEST_SIDE))


def as_image(picture: bytes) -> Image.Image:
    """The picture of a :class:`Seen`."""
    return Image.open(io.BytesIO(picture), formats=["JPEG"]).convert("RGB")


def rule_answer(values: NDArray[np.float32], score: float, threshold: float) -> str:
    """What a rule says of the map (side, side) of an image with this score: whether, and where in the 3 x 3 grid.

    It speaks where a run has no language model, and in tables of many images. The image is called anomalous when its
    score reaches the threshold; the place is that of the pixels that reach it.
    """
    if score < threshold:
        return f"No, nothing looks anomalous: the score {score:.2f} is below the threshold {threshold:.2f}."
    places = [CELL_NAMES[cell] for cell in defect_cells(values >= threshold)]
    where = f", {_listed(places)}" if places else ""
    return f"Yes, there is an anomaly{where}: the score {score:.2f} reaches the threshold {threshold:.2f}."


def _listed(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
