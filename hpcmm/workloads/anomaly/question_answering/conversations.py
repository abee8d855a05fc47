"""Questions and answers on an image: whether it shows an anomaly, and where in a 3 x 3 grid.

Neither tells the category: the words are learnt from the image and its anomaly map, and hold for things never seen.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from hpcmm.workloads.anomaly.question_answering.grid import CELL_NAMES, defect_cells


class Dialogue(NamedTuple):
    """A question of the user's and the answer that is right."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Template:
    """``{}`` of ``yes`` is a list of places."""

    question: str
    yes: str
    yes_somewhere: str
    no: str


TEMPLATES = (
    Template(
        "Is there an anomaly in the image, and where?",
        "Yes, there is an anomaly at {}.",
        "Yes, there is an anomaly.",
        "No, there is no anomaly.",
    ),
    Template(
        "Does the image show a defect, and at which place?",
        "Yes, it shows a defect at {}.",
        "Yes, it shows a defect.",
        "No, it shows no defect.",
    ),
    Template(
        "Is anything damaged, and in which part?",
        "Yes, there is damage at {}.",
        "Yes, there is damage.",
        "No, there is no damage.",
    ),
)


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What an answer says. ``anomalous`` is None if it says neither yes nor no; ``cells`` are of the grid."""

    anomalous: bool | None
    cells: frozenset[int]


_PLACES = sorted(CELL_NAMES, key=len, reverse=True)
"""Longest first, so that "top left" is one place and not two."""
_PLACE = re.compile(r"\b(" + "|".join(name.replace(" ", r"[ -]") for name in _PLACES) + r")\b")
_VERDICT = re.compile(r"\W*(yes|no)\b")


def converse(label: int, mask: NDArray[Any], template: int) -> Dialogue:
    """The dialogue on an image with a mask (height, width), by template number ``template`` (any integer).

    An abnormal image whose mask is empty, as a thin defect's may be once it is made smaller, gets no place.
    """
    chosen = TEMPLATES[template % len(TEMPLATES)]
    if not label:
        return Dialogue(chosen.question, chosen.no)
    return Dialogue(chosen.question, affirm(chosen, defect_cells(mask)))


def affirm(template: Template, cells: Collection[int]) -> str:
    """The template's answer that there is an anomaly at ``cells``, which are named in reading order."""
    places = [f"the {CELL_NAMES[cell]}" for cell in sorted(cells)]
    if not places:
        return template.yes_somewhere
    listed = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
    return template.yes.replace("{}", listed)


def parse_answer(text: str) -> ParsedAnswer:
    """What an answer says, whichever template it follows; it must begin with yes or no. Any text will do."""
    words = text.lower()
    verdict = _VERDICT.match(words)
    if verdict is None:
        return ParsedAnswer(None, frozenset())
    if verdict[1] == "no":
        return ParsedAnswer(False, frozenset())
    return ParsedAnswer(True, frozenset(CELL_NAMES.index(place.replace("-", " ")) for place in _PLACE.findall(words)))
