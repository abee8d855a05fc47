"""Files that are whole under their final name, and files of others read with care: regular ones, of a bounded size."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from stat import S_ISREG, S_IWGRP, S_IWOTH
from typing import IO, Any

Content = str | Callable[[IO[bytes]], None]
"""A file's text, or what writes its bytes."""

MOST_BYTES = 1 << 20
"""Of a small file; a longer one is damage."""


def write_whole(path: Path, content: Content, mode: int | None = None) -> None:
    """Write so that ``path`` never exists half-written. ``mode``: its permissions (None: as the umask wants them).

    Raises OSError, with an earlier file left as it was and nothing beside it.
    """
    write_together(path.parent, {path.name: content}, mode)


def write_together(folder: Path, contents: Mapping[str, Content], mode: int | None = None) -> None:
    """Write every file beside its final name, then rename all. Raises OSError with nothing new left behind."""
    for name in contents:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} there is a folder")
    partials: dict[Path, Path] = {}
    try:
        for name, content in contents.items():
            partial = folder / f".{name}.{secrets.token_hex(4)}"
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode or 0o666)
            partials[partial] = folder / name
            with os.fdopen(descriptor, "wb") as file:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                if isinstance(content, str):
                    file.write(content.encode("utf-8", errors="replace"))
                else:
                    content(file)
        for partial, path in partials.items():
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def write_json(path: Path, values: object, indent: int | None = 2) -> None:
    """``values`` as a JSON file that is whole. Raises OSError."""
    write_whole(path, json.dumps(values, indent=indent) + "\n")


def open_regular(path: Path) -> IO[bytes]:
    """Open to read. Raises OSError, also if it is no regular file: to open a pipe would wait for who writes to it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """All of a small file. Raises OSError, or ValueError for a file that is larger or holds no UTF-8."""
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes} bytes")
    return content.decode("utf-8")


def read_tail(path: Path, most_bytes: int) -> str:
    """The end of a file; empty if it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
            return file.read(most_bytes).decode(errors="replace")
    except OSError:
        return ""


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in ``text``, such as a line of a file; None if it is none."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def read_json_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a small file; empty if there is none."""
    try:
        return json_object(read_text(path, most_bytes)) or {}
    except (OSError, ValueError):
        return {}


def other_writer(*paths: Path) -> Path | None:
    """The first of ``paths`` that another user than this one and root owns, or could write; None if there is none.

    Raises OSError if one is not there.
    """
    for path in paths:
        facts = path.stat()
        if facts.st_uid not in {os.getuid(), 0} or facts.st_mode & (S_IWGRP | S_IWOTH):
            return path
    return None
