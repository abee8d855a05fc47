"""What a server is asked to do, and the limits that it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpcmm.errors import HpcmmError

MEGABYTE = 10**6
CACHE_LIMIT_BYTES = 1000 * MEGABYTE
"""Uploads that lie in the server's private folder at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Settings of one server. Raises HpcmmError for values that cannot be used."""

    run: str
    """Absolute path of the run whose model is served."""
    port: int = 0
    """On the loopback interface; 0 takes a free one."""
    max_batch: int = 8
    """Requests that go through the model at once."""
    max_wait_ms: float = 5.0
    """How long the first request of a batch waits for others."""
    max_waiting: int = 64
    """Requests that wait for the model; more are told that it is busy."""
    max_upload_mb: float = 16.0
    """Size of one file."""
    max_megapixels: float = 40.0
    """Pixels of one image."""
    max_files: int = 32
    """Files of one table, or of one conversation."""
    page: dict[str, Any] = field(default_factory=dict)
    """What the options of the workload's page say; see ``ServedModel.options``."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise HpcmmError(f"--port is {self.port}, but a port is a number up to 65535; 0 takes a free one.")
        for name, most in (("max_batch", 1024), ("max_waiting", 10_000), ("max_files", 1000)):
            check_whole_number(name, getattr(self, name), most)
        if not 0 <= self.max_wait_ms <= 1000:
            raise HpcmmError(f"--max-wait-ms is {self.max_wait_ms}, but must lie between 0 and 1000.")
        check_size("max_upload_mb", self.max_upload_mb)
        check_size("max_megapixels", self.max_megapixels)

    @property
    def max_upload_bytes(self) -> int:
        """Of one file."""
        return round(self.max_upload_mb * MEGABYTE)

    @property
    def max_body_bytes(self) -> int:
        """Of one request that uploads files: four of the largest, or many small ones."""
        return 4 * self.max_upload_bytes

    def check_upload(self, path: Path) -> int:
        """The bytes of an uploaded file. Raises HpcmmError, with a sentence for its sender, if it is large or gone."""
        try:
            size = path.stat().st_size
        except OSError as error:
            raise HpcmmError("The file is no longer here: upload it again.") from error
        if size > self.max_upload_bytes:
            raise HpcmmError(
                f"The file has {size / 1e6:.1f} MB, and at most {self.max_upload_mb:g} MB are taken: make it smaller."
            )
        return size

    def values(self) -> dict[str, Any]:
        """Plain values, from which :meth:`of` makes the same options."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServeOptions:
        """The options that :meth:`values` were taken of."""
        return cls(**values)


def check_whole_number(name: str, value: int, most: int) -> None:
    """Raises HpcmmError, with the option's name, where ``value`` does not lie between 1 and ``most``."""
    if not 1 <= value <= most:
        raise HpcmmError(f"{_option(name)} is {value}, but must lie between 1 and {most}.")


def check_size(name: str, value: float) -> None:
    """Raises HpcmmError, with the option's name, if ``value`` is no size above 0, up to 1000."""
    if not (0 < value <= 1000 and math.isfinite(value)):
        raise HpcmmError(f"{_option(name)} is {value}, but must lie above 0, up to 1000.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
