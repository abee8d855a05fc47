"""Text of strangers for a terminal or a page."""

from __future__ import annotations


def visible(text: str) -> str:
    """``text`` with a replacement character for each that a terminal would obey, such as ANSI codes and newlines."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
