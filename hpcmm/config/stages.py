"""Stages: several runs that one launch queues one after the other, each a configuration of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpcmm.config.command import split
from hpcmm.config.schema import Executor
from hpcmm.config.sweep import Point, compose_points
from hpcmm.errors import HpcmmError
from hpcmm.text import printable

_OF_THE_FIRST = ("train.init_from", "after")
"""What says where the whole chain begins."""


@dataclass(frozen=True)
class Stage:
    """One of the runs of a launch."""

    name: str
    """Empty for a launch without stages."""
    words: tuple[str, ...]
    """Its overrides: its own, and those of the launch."""
    points: list[Point]


def compose_stages(words: Sequence[str]) -> list[Stage]:
    """The stages that overrides ask for; a single one without a name if they ask for none.

    What is typed on the command line wins over a stage's own overrides, and a line says so. Raises HpcmmError as
    :func:`~hpcmm.config.sweep.compose_points` does, and for stages that cannot be.
    """
    points = compose_points(words)
    config = points[0].config
    if not any(point.config.stages for point in points):
        return [Stage("", tuple(words), points)]
    if points[0].overrides:
        raise HpcmmError(
            f"{points[0].overrides[0]} is one point of a sweep, and stages are single runs one after the other: launch "
            "the stages once for each value."
        )
    if config.task._target_ is None:
        raise HpcmmError("stages hand on trained weights, which a script keeps itself: queue scripts by after=RUN.")
    if config.cluster.executor is Executor.local and not config.wait and not config.dry_run:
        raise HpcmmError("stages have no queue to wait in with cluster=local: add wait=true.")
    return [_stage(place, name, own, words) for place, (name, own) in enumerate(config.stages.items())]


def _stage(place: int, name: str, own: Sequence[str], words: Sequence[str]) -> Stage:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise HpcmmError(f"stages has {name!r}: use letters, digits, dots, dashes and underscores, for it names a run.")
    given, command = split(words)
    assert command is None  # of a script
    if place:
        given = [word for word in given if _key(word) not in _OF_THE_FIRST]
    typed = {_key(word) for word in given}
    replaced = [word for word in own if _key(word) in typed]
    for word in replaced:
        print(f"hpcmm: stage {name}: {printable(word)} is not used, for the launch gives that key.", file=sys.stderr)
    whole = (*(word for word in own if word not in replaced), *given)
    try:
        points = compose_points(whole)
    except HpcmmError as error:
        raise HpcmmError(f"At the stage {name}: {error}") from error
    if len(points) > 1 or points[0].overrides:
        raise HpcmmError(f"At the stage {name}: {points[0].overrides[0]} is a sweep, and a stage is a single run.")
    config = points[0].config
    config = replace(config, name=f"{config.name}_{name}", stages={})
    return Stage(name, whole, [replace(points[0], config=config)])


def _key(word: str) -> str:
    """The key of an override, the same for ``model/decoder=mlp`` and ``model.decoder=mlp``."""
    return word.lstrip("+~").partition("=")[0].replace("/", ".")
