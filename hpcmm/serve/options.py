"""What a server is asked to do, and the limits that it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpcmm.errors import HpcmmError

MEGABYTE = 10**6
MOST_QUESTION_CHARACTERS = 300
MOST_CAPTION_CHARACTERS = 120
CACHE_LIMIT_BYTES = 1000 * MEGABYTE
"""Uploads that lie in the server's private folder at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Settings of one server. Raises HpcmmError for values that cannot be used."""

    run: str
    """Absolute path of the run whose model is served."""
    port: int = 0
    """On the loopback interface; 0 takes a free one."""
    threshold: float | None = None
    """Score from which an image is called anomalous; None chooses it on held-out images."""
    max_batch: int = 8
    """Images that go through the model at once."""
    max_wait_ms: float = 5.0
    """How long the first request of a batch waits for others."""
    max_waiting: int = 64
    """Requests that wait for the model; more are told that it is busy."""
    max_upload_mb: float = 16.0
    max_megapixels: float = 40.0
    max_files: int = 32
    """Images of one table."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise HpcmmError(f"--port is {self.port}, but a port is a number up to 65535; 0 takes a free one.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise HpcmmError(f"--threshold is {self.threshold}, but a score lies between 0 and 1.")
        for name, most in (("max_batch", 1024), ("max_waiting", 10_000), ("max_files", 1000)):
            if not 1 <= getattr(self, name) <= most:
                raise HpcmmError(f"{_option(name)} is {getattr(self, name)}, but must lie between 1 and {most}.")
        if not 0 <= self.max_wait_ms <= 1000:
            raise HpcmmError(f"--max-wait-ms is {self.max_wait_ms}, but must lie between 0 and 1000.")
        for name in ("max_upload_mb", "max_megapixels"):
            if not (0 < getattr(self, name) <= 1000 and math.isfinite(getattr(self, name))):
                raise HpcmmError(f"{_option(name)} is {getattr(self, name)}, but must lie above 0, up to 1000.")

    @property
    def max_upload_bytes(self) -> int:
        """Of one image."""
        return round(self.max_upload_mb * MEGABYTE)

    @property
    def max_body_bytes(self) -> int:
        """Of one request that uploads images: four of the largest, or many small ones."""
        return 4 * self.max_upload_bytes

    def values(self) -> dict[str, Any]:
        """Plain values, from which :meth:`of` makes the same options."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServeOptions:
        """The options that :meth:`values` were taken of."""
        return cls(**values)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
