"""What a key of the configuration is: its default, help and bounds, kept in the metadata of its dataclass field.

One loop checks the bounds of every key, and one lists the keys for ``--help``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")

MISSING: Any = "???"
"""OmegaConf's marker of a value that the YAML tree must give."""
MOST = 2**31 - 1
"""What Slurm's and the libraries' whole numbers hold."""
_WIDTH = 34
"""Characters of a key and its default before its help."""


@dataclass(frozen=True)
class Bounds:
    """What a number must be. All of a list's numbers must."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    """As ``least``, but the bound itself is not allowed."""

    def problem(self, key: str, value: float) -> str | None:
        """A sentence that says what is wrong with ``value``; None if nothing is."""
        if isinstance(value, int):
            if self.least is not None and value < self.least:
                return f"{key} is {value}, but must be at least {self.least:g}."
            most = MOST if self.most is None else self.most
            return f"{key} is {value}, but must be at most {most:.0f}." if value > most else None
        if self.above is not None and not (value > self.above and math.isfinite(value)):
            return f"{key} is {value}, but must be a finite number above {self.above:g}."
        if self.most is not None and self.least is not None and not self.least <= value <= self.most:
            return f"{key} is {value}, but must lie between {self.least:g} and {self.most:g}."
        if self.least is not None and not (value >= self.least and math.isfinite(value)):
            return f"{key} is {value}, but must be a finite number, {self.least:g} or above."
        return None


@dataclass(frozen=True)
class PartGroup:
    """A key whose value is a part: a class that a YAML file of a config group names, with its parameters."""

    group: str
    """The config group, such as ``model/decoder``: a name selects ``conf/<group>/<name>.yaml``."""
    base: str
    """The class that each part is a subclass of, as ``package.module.Class``."""
    given: tuple[str, ...] = ()
    """Parameters that the workload gives when it builds the part, so that no YAML file has to."""
    offered: tuple[str, ...] = ()
    """Parameters that are given unless the YAML file does."""


def key(
    default: T,
    help: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    part: PartGroup | None = None,
) -> T:
    """A key with a default, its help for ``--help``, and the bounds of a number. None, if allowed, has no bounds."""
    return field(default=default, metadata=_metadata(help, Bounds(least, most, above), part))


def made_by(factory: Callable[[], T], help: str = "", *, parts: PartGroup | None = None) -> T:
    """A key whose default is a new list, dictionary or section each time.

    ``parts``: each value of the dictionary is a part of that group, under a name of the user's, or None for none.
    """
    return field(default_factory=factory, metadata={**_metadata(help, Bounds(), None), "parts": parts})


def _metadata(words: str, bounds: Bounds, part: PartGroup | None) -> dict[str, Any]:
    return {"help": words, "bounds": bounds, "part": part}


def out_of_bounds(section: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each number of ``section``, a dataclass, and of the sections within it that is out of bounds."""
    for key, value, bounds in leaves(section, prefix):
        if bounds is None or isinstance(value, bool):
            continue
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, (int, float)) and (problem := bounds.problem(key, number)):
                yield problem


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bounds | None]]:
    """Dotted name, value and bounds of each key of ``section``, a dataclass, that is no section itself."""
    schema: Any = type(section)
    for name, bounds in _keys_of(schema):
        value = getattr(section, name)
        if hasattr(type(value), "__dataclass_fields__"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, bounds


def copied(value: T) -> T:
    """A copy of a section, or of a key's value, that shares no list with it: several times faster than deepcopy."""
    if hasattr(type(value), "__dataclass_fields__"):
        copy = object.__new__(type(value))
        copy.__dict__.update({name: copied(each) for name, each in vars(value).items()})
        return copy
    if isinstance(value, dict):
        return type(value)((key, copied(each)) for key, each in value.items())
    return type(value)(map(copied, value)) if isinstance(value, list) else value


@functools.cache
def _keys_of(schema: Any) -> tuple[tuple[str, Bounds | None], ...]:
    return tuple((each.name, each.metadata.get("bounds")) for each in fields(schema))


def parts_of(schema: Any) -> tuple[tuple[str, PartGroup], ...]:
    """The dotted names of all keys of the dataclass ``schema`` that hold a part."""
    return _keys_with(schema, "part")


def part_maps_of(schema: Any) -> tuple[tuple[str, PartGroup], ...]:
    """The dotted names of all keys of the dataclass ``schema`` that hold a dictionary of parts."""
    return _keys_with(schema, "parts")


@functools.cache
def _keys_with(schema: Any, what: str) -> tuple[tuple[str, PartGroup], ...]:
    found: list[tuple[str, PartGroup]] = []
    for each in fields(schema):
        if (group := each.metadata.get(what)) is not None:
            found.append((each.name, group))
        elif (inner := _section(schema, each)) is not None:
            found += [(f"{each.name}.{key}", group) for key, group in _keys_with(inner, what)]
    return tuple(found)


def keys_help(schema: type, prefix: str = "") -> Iterator[str]:
    """A line for each key of ``schema`` that is no section: its name, its default and its help; then the sections."""
    sections = {each.name: inner for each in fields(schema) if (inner := _section(schema, each)) is not None}
    for each in fields(schema):
        if each.name not in sections and not each.name.startswith("_"):
            words = " ".join(each.metadata.get("help", "").replace("``", "").split())
            yield f"  {prefix + each.name + _default(each):<{_WIDTH}} {words}".rstrip()
    for name, inner in sections.items():
        yield from keys_help(inner, f"{prefix}{name}.")


def type_hints(schema: Any) -> dict[str, Any]:
    """The types of a class's fields. Python evaluates their text at each question, which a sweep asks thousands of."""
    return _type_hints(schema)


@functools.cache
def _type_hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _section(schema: Any, each: Field[Any]) -> type | None:
    """The dataclass of a key that is a section of keys."""
    kind = type_hints(schema)[each.name]
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def _default(each: Field[Any]) -> str:
    default = each.default
    if default is NO_DEFAULT or default == MISSING:
        return ""
    if isinstance(default, Mapping):
        return "=..."
    return f"={'null' if default is None else str(default).lower() if isinstance(default, bool) else default}"
