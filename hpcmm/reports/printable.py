"""Text from outside made safe to show: names in a report may hold anything."""

from __future__ import annotations


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
