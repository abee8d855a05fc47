"""A run's trained model as the server asks it: images and captions to maps and scores, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hpcmm.worker.distributed import select_accelerator
from hpcmm.workloads.anomaly.data.images import normalise
from hpcmm.workloads.anomaly.models import AnomalyModel
from hpcmm.workloads.anomaly.models.anomaly import Encoded
from hpcmm.workloads.anomaly.models.answers import answer

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Request:
    """One image (side, side, 3) from 0 to 1, what it shows, and a question where words are wanted."""

    image: Floats
    caption: str
    question: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What the model finds in one image: map (side, side) and score from 0 to 1, its words if it has any."""

    map: Floats
    score: float
    words: str | None = None


class Predictor:
    """The model of a run on the device that there is."""

    def __init__(self, model: AnomalyModel, side: int) -> None:
        self._device = torch.device(select_accelerator())
        self.model = model.to(self._device)
        self.side = side

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def speaks(self) -> bool:
        """Whether the run has a language model, which answers questions."""
        return self.model.language is not None

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Request]) -> list[Finding]:
        """Findings in the order of the requests."""
        images = torch.from_numpy(np.stack([normalise(request.image) for request in requests])).to(self._device)
        encoded = self.model.encode(images)
        logits = self.model(encoded, [request.caption for request in requests])
        maps = self.model.anomaly_map(logits).float().cpu().numpy()
        scores = self.model.score(logits).float().cpu().numpy()
        words = self._words(requests, encoded, logits)
        return [Finding(maps[place], float(scores[place]), words.get(place)) for place in range(len(requests))]

    def _words(self, requests: Sequence[Request], encoded: Encoded, logits: torch.Tensor) -> dict[int, str]:
        """The language model's answers to the questions that were asked, by the request's place."""
        asked = [place for place, request in enumerate(requests) if request.question]
        if not asked or not self.speaks:
            return {}
        some = Encoded([each[asked] for each in encoded.maps], encoded.size)
        captions = [requests[place].caption for place in asked]
        questions = [requests[place].question or "" for place in asked]
        return dict(zip(asked, answer(self.model, some, logits[asked], captions, questions), strict=True))
