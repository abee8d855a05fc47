"""Write tables and pages so that a file under its final name is always whole, and all of them of one analysis."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hpcmm.analysis.study import Study
from hpcmm.errors import HpcmmError
from hpcmm.page.html import page
from hpcmm.page.markdown import summary


def write_outputs(study: Study, folder: Path) -> None:
    """All tables as CSV, ``summary.md`` and ``report.html`` into ``folder``.

    Raises HpcmmError (a full disk) with the outputs of an earlier analysis left as they were.
    """
    texts = {f"{name}.csv": table.to_csv(index=False, lineterminator="\n") for name, table in study.tables.items()}
    texts |= {"summary.md": summary(study), "report.html": page(study)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, texts)
    except OSError as error:
        raise HpcmmError(
            f"{folder} cannot be written ({error.strerror}): free some space there, or name another folder with --out."
        ) from error


def write_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Write every text beside its final name, then rename all. Raises OSError with nothing new left behind."""
    partials: dict[Path, Path] = {}
    try:
        for name, text in texts.items():
            handle, partial = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            partials[Path(partial)] = folder / name
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="") as file:
                file.write(text)
            Path(partial).chmod(0o644)
        for partial_path, path in partials.items():
            partial_path.replace(path)
    finally:
        for partial_path in partials:
            partial_path.unlink(missing_ok=True)
