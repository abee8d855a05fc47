"""Training images that cannot be used: each is told once, whichever loader worker meets it, and all are counted."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.schema import OnError

log = logging.getLogger("hpcmm.workloads.anomaly.data")


class SkippedImages:
    """Flags of a set's images, in memory that loader workers share with the process that started them."""

    def __init__(self, images: int, on_error: OnError) -> None:
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
