"""What becomes of an image that cannot be used: the run ends, or goes on without it, says so once and counts it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.schema import OnError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("hpcmm.workloads.anomaly.data")


class BadSamples:
    """The images of one data set that cannot be used."""

    def __init__(self, on_error: OnError, fate: str) -> None:
        """``fate``: what happens to such an image under ``data.on_error=skip``, as "is ..."."""
        self._refuse = on_error is OnError.refuse
        self._fate = fate
        self._images: set[Path] = set()

    def note(self, image: Path, error: HpcmmError) -> None:
        """Raise ``error``, or say it, once for each image, and how many there are by now."""
        if self._refuse:
            raise error
        if image not in self._images:
            self._images.add(image)
            log.warning("%s It is %s, as data.on_error says; %d so far.", error, self._fate, len(self._images))

    def __len__(self) -> int:
        return len(self._images)

    def sum_up(self, of: int, what: str) -> None:
        """One line on how many of ``of`` images are concerned; none if all can be used."""
        if self._images:
            log.warning("%d of %d %s are %s.", len(self._images), of, what, self._fate)


REFUSED = BadSamples(OnError.refuse, "refused")
"""For a reader whose caller wants all images or none."""


class SkippedImages:
    """Flags of a set's images, in memory that loader workers share with the process that started them."""

    def __init__(self, images: int, on_error: OnError) -> None:
        import torch  # noqa: PLC0415 -- which listing a data set does not need

        self._refuse = on_error is OnError.refuse
        self._flags: Tensor = torch.zeros(images, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def note(self, index: int, error: HpcmmError) -> None:
        """Raise ``error``, or note that image ``index`` cannot be used, and say it, unless a worker has already."""
        if self._refuse:
            raise error
        if not self._flags[index]:
            self._flags[index] = 1
            log.warning("%s It is replaced by the next, as data.on_error says.", error)

    @property
    def flags(self) -> Tensor:
        """(images,), uint8, ones for the skipped: what the workers have met so far."""
        return self._flags.clone()
