"""Data that the project makes, of which a run's seed is a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def notes_on_other_seed(root: str | None, seed: int, before: Mapping[str, Any], what: str) -> Iterator[str]:
    """Whether the run to start from had other made data: the rest of a sentence that begins with its folder.

    ``root``: this run's own data folder, if it has one, for then nothing is made. ``before``: the configuration of the
    other run, of values of any type. ``what``: what is made, such as ``stand-in images``.
    """
    data, train = before.get("data"), before.get("train")
    if root is not None or not isinstance(data, dict) or data.get("root") is not None:
        return
    other = train.get("seed") if isinstance(train, dict) else None
    if isinstance(other, int) and other != seed:
        yield (
            f"trained with train.seed={other} and this run has {seed}, so its {what} are others: add "
            f"train.seed={other} to go on with the same."
        )
