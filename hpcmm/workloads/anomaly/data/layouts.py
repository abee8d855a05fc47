"""The folder layouts that data sets come in, chosen by ``data.layout``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hpcmm.workloads.anomaly.data import mvtec, visa
from hpcmm.workloads.anomaly.data.bad_samples import BadSamples
from hpcmm.workloads.anomaly.data.samples import Sample
from hpcmm.workloads.anomaly.schema import Layout


@dataclass(frozen=True, slots=True)
class LayoutReader:
    """How to list what lies under a root in one layout; each raises HpcmmError if the layout is broken.

    A listed image whose file or mask is missing is noted with the caller's :class:`BadSamples`, and left out.
    """

    categories: Callable[[Path, Sequence[str]], list[str]]
    train: Callable[[Path, str, BadSamples], list[Sample]]
    test: Callable[[Path, str, BadSamples], list[Sample]]


READERS: Mapping[Layout, LayoutReader] = MappingProxyType(
    {
        Layout.mvtec: LayoutReader(mvtec.list_categories, mvtec.train_samples, mvtec.test_samples),
        Layout.visa: LayoutReader(visa.list_categories, visa.train_samples, visa.test_samples),
    }
)
