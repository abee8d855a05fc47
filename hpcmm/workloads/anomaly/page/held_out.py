"""The held-out images of a run's data: examples for the page, and what the threshold is chosen on."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hpcmm.errors import HpcmmError
from hpcmm.files import read_text, write_json
from hpcmm.runs.run_dir import RunDir, newest_checkpoint
from hpcmm.workloads.anomaly.data.anomaly import TestImages, build_datasets
from hpcmm.workloads.anomaly.data.samples import Sample
from hpcmm.workloads.anomaly.data_root import data_config, data_root
from hpcmm.workloads.anomaly.models.scores import best_decision
from hpcmm.workloads.anomaly.page.predictor import Predictor
from hpcmm.workloads.anomaly.schema import AnomalyConfig
from hpcmm.workloads.anomaly.scoring import score_images

MOST_EXAMPLES = 8
MOST_IMAGES = 200
"""Held-out images that are scored for the threshold, spread evenly over all."""
UNKNOWN = 0.5
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out image of the run's data, with the phrase of its category."""

    sample: Sample
    caption: str


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold and, for the page, where it is from."""

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class _Kept:
    """``threshold.json``: what was chosen, for which checkpoint."""

    checkpoint: str
    images: int
    value: float
    f1: float
    accuracy: float

    @property
    def threshold(self) -> Threshold:
        origin = f"largest F1 ({self.f1:.2f}, accuracy {self.accuracy:.2f}) over {self.images} held-out images"
        return Threshold(self.value, origin)


def held_out_images(config: AnomalyConfig) -> TestImages | None:
    """None, and a line that says so, if the data is not at hand: the model can be served without."""
    try:
        return build_datasets(data_root(config), data_config(config), config.train.seed)[1]
    except (HpcmmError, OSError) as error:
        print(f"hpcmm.serve: no examples and no choice of a threshold: {error}", file=sys.stderr, flush=True)
        return None


def examples_of(test: TestImages | None) -> tuple[list[Example], list[str]]:
    """A few images, first a defect of each category and then normal ones; and the phrases of all categories."""
    if test is None:
        return [], []
    every = [Example(*test.described(index)) for index in range(len(test))]
    firsts = {(example.sample.category, example.sample.label): example for example in reversed(every)}
    chosen = sorted(firsts.values(), key=lambda example: (-example.sample.label, example.sample.category))
    return chosen[:MOST_EXAMPLES], list(dict.fromkeys(example.caption for example in every))


def choose_threshold(run: RunDir, predictor: Predictor, test: TestImages | None, given: float | None) -> Threshold:
    """``given``, else what was kept for this checkpoint, else that of the largest F1 over held-out images.

    Where there are no such images, or all are of one kind, it is 0.5, and the origin says so.
    """
    if given is not None:
        return Threshold(given, "given when the server was started")
    checkpoint = newest_checkpoint(run)
    kept = _read(run.threshold)
    if kept is not None and kept.checkpoint == checkpoint:
        return kept.threshold
    if test is None:
        return Threshold(UNKNOWN, "not calibrated: the run's held-out images are not at hand")
    try:
        chosen = _chosen(checkpoint, predictor, test)
    except HpcmmError as error:
        return Threshold(UNKNOWN, f"not calibrated: {error}")
    if math.isnan(chosen.value):
        return Threshold(UNKNOWN, "not calibrated: the held-out images are all of one kind")
    _write(run.threshold, chosen)
    return chosen.threshold


def _chosen(checkpoint: str, predictor: Predictor, test: TestImages) -> _Kept:
    places = np.unique(np.linspace(0, len(test) - 1, min(len(test), MOST_IMAGES)).round().astype(int))
    some = [int(place) for place in places]
    told = f"hpcmm.serve: choosing the threshold on {len(some)} held-out images, once for this checkpoint."
    print(told, file=sys.stderr, flush=True)
    scored = score_images(predictor.model, test.part(some), _BATCH, predictor.device, words=False)
    decision = best_decision(scored.score, scored.label)
    return _Kept(checkpoint, len(some), decision.threshold, decision.f1, decision.accuracy)


def _read(path: Path) -> _Kept | None:
    try:
        kept = _Kept(**json.loads(read_text(path, within=path.parent.parent)))
        return kept if 0 <= kept.value <= 1 else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _write(path: Path, kept: _Kept) -> None:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(path, asdict(kept))
    except OSError as error:  # it is chosen again at the next start
        print(f"hpcmm.serve: {path} cannot be written ({error.strerror}).", file=sys.stderr)
