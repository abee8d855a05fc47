"""The log of requests: JSON lines that only the owner can read, without contents of uploads and without the token."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from hpcmm.errors import HpcmmError

LIMIT_BYTES = 10_000_000
"""At this size the log becomes ``requests.jsonl.1``, and the one before is dropped."""
_MOST_CHARACTERS = 400


class RequestLog:
    """Appends lines to a file that several servers of one run may share.

    Raises HpcmmError when the file cannot be made.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._said = False
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.close(self._open())
        except OSError as error:
            raise HpcmmError(
                f"The log of requests {path} cannot be written ({error.strerror}): is the run yours, and the disk free?"
            ) from error

    def write(self, **fields: Any) -> None:
        """One line. A full disk is said once, and takes no answer from anybody."""
        line = json.dumps({"time": _now(), **{key: _bounded(value) for key, value in fields.items()}}) + "\n"
        try:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.write(descriptor, line.encode("ascii"))
                if os.fstat(descriptor).st_size >= self._limit_bytes and _is(descriptor, self._path):
                    self._path.replace(self._path.with_name(self._path.name + ".1"))
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._said:
                print(f"hpcmm.serve: {self._path} cannot be written ({error.strerror}).", file=sys.stderr, flush=True)
            self._said = True

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)


def _is(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still this file: another server may have moved it away."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _bounded(value: Any) -> Any:
    """Text of bounded length; JSON escapes line breaks and whatever else a terminal would heed."""
    return value[:_MOST_CHARACTERS] if isinstance(value, str) else value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"
