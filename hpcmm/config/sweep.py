"""Sweep overrides -> the points of a sweep, each a configuration of its own.

A sweep is Hydra's: ``train.learning_rate=1e-3,1e-4 train.seed=range(0,3)`` are the six points of the product. All
points are one job array, so they ask the scheduler for the same.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from hpcmm.config import command as command_line
from hpcmm.config.compose import compose_tree, override_text, parse_overrides, to_run
from hpcmm.config.keys import copied
from hpcmm.config.parts import with_parts
from hpcmm.config.schema import SCRIPT, RunConfig
from hpcmm.config.space import ConfigSpace, elements_of, explained, space_of
from hpcmm.errors import HpcmmError

MOST_POINTS = 100_000
_MOST_SHOWN = 20
"""Refused points that a launch names; the ledger has all."""
_CARRIES_VALUES = re.compile(r"\$\{(?!oc\.env:)")
"""An interpolation of another key."""
SHARED_BY_ALL = ("name", "runs_root", "wait", "dry_run", "after", "analyze", "cluster", "launch")
"""Keys that say something of the one job array, and not of a point."""


@dataclass(frozen=True)
class Point:
    """One point: what sets it apart, and its configuration."""

    overrides: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class RefusedPoint:
    """A point of a sweep that cannot run."""

    overrides: tuple[str, ...]
    reason: str


def divided(points: Sequence[Point], check: Callable[[Point], None]) -> tuple[list[Point], list[RefusedPoint]]:
    """The points that ``check`` accepts, and those that it refuses by an HpcmmError.

    Raises HpcmmError if it refuses all of them, or the one point of a launch that is no sweep.
    """
    kept, refused = list[Point](), list[RefusedPoint]()
    for point in points:
        try:
            check(point)
            kept.append(point)
        except HpcmmError as error:
            if not point.overrides:
                raise
            refused.append(RefusedPoint(point.overrides, str(error)))
    if not kept:
        raise HpcmmError(f"At the point {', '.join(refused[0].overrides)}: {refused[0].reason}")
    return kept, refused


def text_of_refused(refused: Sequence[RefusedPoint], left: int) -> str:
    """Lines that name refused points beside ``left`` that can run; empty without any."""
    if not refused:
        return ""
    listed = [f"  {', '.join(each.overrides)}: {' '.join(each.reason.split())}" for each in refused[:_MOST_SHOWN]]
    listed += [f"  ... and {len(refused) - _MOST_SHOWN} more"] * (len(refused) > _MOST_SHOWN)
    said = f"{len(refused)} of {left + len(refused)} points {'is' if len(refused) == 1 else 'are'} refused"
    return "\n".join([f"hpcmm: {said}; the others go on:", *listed, ""])


def compose_points(words: Sequence[str]) -> list[Point]:
    """The points that overrides span; a single one without overrides of its own if nothing is swept.

    What follows the word ``--`` is the command of all points. Raises HpcmmError as
    :func:`~hpcmm.config.compose.compose_run` does, for a sweep without a finite number of points, for points that
    differ in what the array shares, and for keys that mean nothing to the program that a point runs.
    """
    overrides, command = command_line.split(words)
    if command is not None and not any(word.startswith(_CHOOSES_THE_TASK) for word in overrides):
        overrides = [*overrides, f"task={SCRIPT}"]
    space = space_of(overrides)
    parsed = parse_overrides(overrides, space)
    points = _composed(parsed, space)
    if command is not None:
        swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
        points = [replace(point, config=command_line.with_command(point.config, command, swept)) for point in points]
    given = [override.key_or_group for override in parsed]
    for point in points:
        command_line.refuse_keys_without_effect(point.config, given)
    return points


_CHOOSES_THE_TASK = ("task=", "+task=", "++task=", "experiment=", "+experiment=")


def _composed(parsed: Sequence[Override], space: ConfigSpace) -> list[Point]:
    swept = [override for override in parsed if override.is_sweep_override()]
    fixed = [override for override in parsed if not override.is_sweep_override()]
    if not swept:
        with explained(space):
            return [Point((), to_run(compose_tree(fixed, space, once=True)))]
    values = [_values(override, space) for override in swept]
    count = 1
    for choices in values:
        count *= len(choices)
    if not 1 <= count <= MOST_POINTS:
        raise HpcmmError(f"This sweep has {count} points, but must have 1 to {MOST_POINTS}.")
    with explained(space):
        points = list(_points(fixed, itertools.product(*values), space))
    _check_shared(points)
    return points


def _values(override: Override, space: ConfigSpace) -> list[Override]:
    """An override for each value of a sweep."""
    if not override.is_discrete_sweep():
        raise HpcmmError(f"{override.input_line} has no end: write values, choice(...) or range(...).")
    if isinstance(override._value, RangeSweep):
        _check_range(override, override._value)
    return elements_of(override, space)


def _check_range(override: Override, swept: RangeSweep) -> None:
    """Raises HpcmmError for a range that has no end or far too many values; looked at before any is made."""
    start, stop, step = (float(number or 0) for number in (swept.start, swept.stop, swept.step))
    if not step or not all(map(math.isfinite, (start, stop, step))) or start + step == start:
        raise HpcmmError(f"{override.input_line} has no end: write range(START,STOP,STEP) of finite numbers.")
    if (stop - start) / step > MOST_POINTS:
        raise HpcmmError(f"{override.input_line} is a sweep of more than {MOST_POINTS} points, the most there may be.")


def _points(fixed: list[Override], products: Iterable[tuple[Override, ...]], space: ConfigSpace) -> Iterator[Point]:
    """Compose each combination of group options once; its points differ in single values, set on typed copies."""
    groups = space.groups
    families: dict[tuple[str, ...], _Family] = {}
    for product in products:
        options = [override for override in product if override.key_or_group in groups]
        values = [override for override in product if override.key_or_group not in groups]
        chosen = tuple(override_text(option, space) for option in options)
        if chosen not in families:
            families[chosen] = _Family(compose_tree([*fixed, *options], space), values, space)
        yield Point(tuple(override.input_line or "" for override in product), families[chosen].point(values))


class _Family:
    """The points of one composed tree, which differ in the values of some keys.

    Typing the whole tree takes OmegaConf 10 ms or more, so it is done once, and each value is typed alone. If an
    interpolation may carry a value to other keys, each point is typed as a whole.
    """

    def __init__(self, tree: DictConfig, first: Sequence[Override], space: ConfigSpace) -> None:
        self._tree = tree
        self._space = space
        fields_set = [self._space.field_of(override.key_or_group) for override in first]
        carried = _CARRIES_VALUES.search(OmegaConf.to_yaml(tree)) is not None
        self._base = None if carried or len(set(fields_set)) < len(fields_set) else self._typed(first)
        self._values: dict[str, Any] = {}
        """Typed values, by the text of their override."""

    def point(self, values: Sequence[Override]) -> RunConfig:
        if self._base is None:
            return self._typed(values)
        run = copied(self._base)
        for override in values:
            *path, name = self._space.field_of(override.key_or_group)
            setattr(functools.reduce(getattr, path, run), name, copied(self._value(override)))
        return with_parts(run, self._space.folders)

    def _typed(self, values: Sequence[Override]) -> RunConfig:
        tree = copy.deepcopy(self._tree)
        for override in values:
            _set(tree, override)
        return to_run(tree)

    def _value(self, override: Override) -> Any:
        """What the override makes of its field."""
        text = override_text(override, self._space)
        if text not in self._values:
            value = override.value()
            tree = copy.deepcopy(self._tree) if isinstance(value, dict) else self._tree
            _set(tree, override)
            typed = OmegaConf.select(tree, ".".join(self._space.field_of(override.key_or_group)))
            self._values[text] = OmegaConf.to_object(typed) if OmegaConf.is_config(typed) else typed
        return self._values[text]


def _set(tree: DictConfig, override: Override) -> None:
    OmegaConf.update(tree, override.key_or_group, override.value(), merge=True, force_add=True)


def _check_shared(points: list[Point]) -> None:
    first = points[0].config
    for point in points:
        for key in SHARED_BY_ALL:
            if getattr(point.config, key) != getattr(first, key):
                raise HpcmmError(
                    f"{key} differs between the points {', '.join(points[0].overrides)} and "
                    f"{', '.join(point.overrides)}: a sweep is one job array, so launch these one by one."
                )
