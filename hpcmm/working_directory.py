"""The folder that a command is started in."""

from __future__ import annotations

import os

from hpcmm.errors import HpcmmError


def check_working_directory() -> None:
    """Raises HpcmmError where the folder has been deleted, or closed to the user, in the meantime."""
    try:
        os.getcwd()  # noqa: PTH109 -- pathlib would make an object of it
    except OSError as error:
        raise HpcmmError(f"The working directory is gone ({error.strerror}): change to another folder.") from error
