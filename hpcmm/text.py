"""Untrusted text made safe to print: names in a report, a log or a request may hold anything."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class StrEnum(str, Enum):
    """Words that are texts as well, as ``enum.StrEnum``, which Python 3.9 and 3.10 do not have."""

    __str__ = str.__str__

    def __format__(self, specification: str) -> str:
        return str.__format__(self, specification)


def visible(text: str, replacement: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """``text`` with ``replacement`` for each character that a terminal would obey, as in ANSI codes, and newlines."""
    return "".join(each if each.isprintable() else replacement for each in text)


def printable(text: str) -> str:
    """``text`` with every character that does not print, such as controls and direction marks, as its escape.

    >>> printable("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first ``most`` names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def printable_lines(text: str) -> str:
    """As :func:`printable`, but line breaks and tabs stay.

    >>> printable_lines("one\\ttwo\\n\\x1b[31mred")
    'one\\ttwo\\n\\\\x1b[31mred'
    """
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
