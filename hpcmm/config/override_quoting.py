"""Words that must reach a program as they were written, though Hydra's grammar would read them as numbers.

``task.args=[--lr,1e-4]`` is to hand over ``1e-4`` and not ``0.0001``, ``cluster.environment.X=true`` not ``True``.
"""

from __future__ import annotations

import re

_PIECES = re.compile(
    r"""
    (?P<quoted> '(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" )
    | (?P<bare> [^\s,\[\]{}:'"\\()$]+ (?: (?:[ \t]+|:) [^\s,\[\]{}:'"\\()$]+ )* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_KEPT = frozenset({"null"})
_MEANS_MORE = re.compile(r"[\\$(){}]")
"""An escape, an interpolation, a call such as ``range(1,3)``, a dictionary: Hydra's grammar says what they are."""


def quote_bare_words(value: str) -> str:
    """``value`` of an override, a word, list or dictionary, with quotes around each bare word in it.

    Quoted words and null stay as they are, and so does the whole of a value that is no word or list of words.
    """
    if _MEANS_MORE.search(_PIECES.sub(lambda piece: piece["other"] or "", value)):
        return value
    return _PIECES.sub(_quoted, value)


def _quoted(piece: re.Match[str]) -> str:
    word = piece["bare"]
    return piece[0] if word is None or word in _KEPT else f"'{word}'"
