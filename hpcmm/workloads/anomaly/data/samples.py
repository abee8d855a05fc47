"""One image file of a data set, whatever the set's folder layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GOOD = "good"


@dataclass(frozen=True, slots=True)
class Sample:
    """``mask`` is None for a normal image, whose ``defect`` is :data:`GOOD`."""

    image: Path
    category: str
    defect: str
    mask: Path | None

    @property
    def label(self) -> int:
        """1 with a defect, 0 without."""
        return int(self.mask is not None)
