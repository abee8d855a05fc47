"""What a run was trained on and scored on, in a word: a published data set, stand-ins, or a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hpcmm.workloads.anomaly.data import mvtec, visa
from hpcmm.workloads.anomaly.data.layouts import READERS
from hpcmm.workloads.anomaly.data.standins import STAMP
from hpcmm.workloads.anomaly.schema import DataConfig

MVTEC, VISA, STANDINS = "MVTec-AD", "VisA", "stand-ins"
PUBLISHED = {
    "fcn": 0.9094,
    "mlp": 0.9109,
    "resnet": 0.9049,
    "mlp_bn": 0.9093,
}
"""Accuracy by decoder, trained on VisA and scored on MVTec-AD, as reported by "Towards Efficient Multimodal AI: A
Flexible Framework for Distributed Training" (NCHC and NYCU)."""


def origins(root: Path, data: DataConfig) -> tuple[str, str]:
    """What a run with ``data`` was trained on in ``root``, and what it was scored on.

    A published data set is named only where all its categories are used. Raises HpcmmError as the readers do.
    """
    trained_on = _name(root, READERS[data.layout].categories(root, data.categories))
    if data.test_root is None:
        return trained_on, trained_on
    test_root, layout = Path(data.test_root).expanduser(), data.test_layout or data.layout
    return trained_on, _name(test_root, READERS[layout].categories(test_root, data.test_categories))


def is_published_experiment(trained_on: Iterable[str], scored_on: Iterable[str]) -> bool:
    """Whether every run did what the paper did, so that its numbers may stand beside."""
    return set(trained_on) == {VISA} and set(scored_on) == {MVTEC}


def _name(root: Path, categories: list[str]) -> str:
    if (root / STAMP).is_file():
        return STANDINS
    return {visa.CATEGORIES: VISA, mvtec.CATEGORIES: MVTEC}.get(frozenset(categories), root.name)
