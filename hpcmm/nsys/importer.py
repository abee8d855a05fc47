"""From nsys' raw capture (``.qdstrm``) to a report (``.nsys-rep``), if nsys itself does not find its importer.

Debian's package of nsys 2022.4 is such a one: the importer is there, in a folder that nsys does not look into. And a
capture that was cut short is left raw everywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.resources import FOLDER_OF_NSYS, planted

_NAME = "QdstrmImporter"
_TIMEOUT_S = 3600


def find_importer() -> Path | None:
    """The importer that is on the PATH, or that belongs to the nsys there, and no other user can have put there."""
    on_path = shutil.which(_NAME)
    if on_path is not None:
        return Path(on_path)
    nsys = shutil.which("nsys")
    if nsys is None:
        return None
    found = (path for place in _hops(Path(nsys)) for path in sorted(place.parent.parent.glob(f"host-linux-*/{_NAME}")))
    own = (path for path in found if not any(map(planted, (path, path.parent))))
    return next((path for path in own if os.access(path, os.X_OK)), None)


def _hops(path: Path) -> Iterator[Path]:
    """Each hop of a chain of links: packages put the importer beside one in the middle."""
    yield path
    while path.is_symlink():
        path = Path(os.path.normpath(path.parent / path.readlink()))
        yield path
    yield path.resolve()


def import_qdstrm(raw: Path, report: Path, subject: Path | None = None) -> None:
    """Make ``report`` from ``raw``, to which the importer appends: give it a file, and a folder, of your own.

    Raises HpcmmError, which names ``subject`` (``raw`` by default), when that cannot be done.
    """
    subject = subject or raw
    importer = find_importer()
    if importer is None:
        raise HpcmmError(f"{subject} needs {_NAME}, which comes with nsys: install nsys, or put {_NAME} on the PATH.")
    command = [str(importer.absolute()), "--input-file", str(raw.absolute()), "--output-file", str(report.absolute())]
    try:
        done = subprocess.run(
            command,
            cwd=FOLDER_OF_NSYS,
            env=os.environ | {"TMPDIR": str(raw.parent.absolute())},
            umask=0o077,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HpcmmError(f"{subject} could not be imported: {importer} did not run to its end ({error}).") from error
    if done.returncode != 0 or not report.is_file():
        raise HpcmmError(f"{subject} could not be imported: the capture is truncated or damaged.")
