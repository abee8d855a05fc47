"""What is asked of pictures and speech, and what the right answer is; planned first, made of files afterwards.

Each answer of a kind is right equally often, so the chance to be right without a look is one by their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

import numpy as np

from hpcmm.workloads.omni.data.made.pictures import COLOURS, COUNTS, SHAPES, SURFACES, Drawing
from hpcmm.workloads.omni.data.made.speech import HELD_OUT_TAKES, TAKES, Take

T = TypeVar("T")

IMAGE, SOUND, TEXT = "image", "sound", "text"

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMANDS = ("go", "stop", "left", "right", "up", "down", "yes", "no")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question. ``{which}`` of a question says which picture or sound is meant, if there are two."""

    modality: str
    answers: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def chance(self) -> float:
        """The accuracy of whoever does not look."""
        return 1 / len(self.answers)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "surface": Kind(
            IMAGE, tuple(SURFACES), ("What does the {which}picture show?", "What is in the {which}picture?")
        ),
        "shape": Kind(
            IMAGE, tuple(SHAPES), ("What shape is in the {which}picture?", "Name the shape in the {which}picture.")
        ),
        "colour": Kind(
            IMAGE,
            tuple(COLOURS),
            ("What colour are the shapes in the {which}picture?", "Name the colour in the {which}picture."),
        ),
        "count": Kind(
            IMAGE, COUNTS, ("How many shapes are in the {which}picture?", "Count the shapes in the {which}picture.")
        ),
        "digit": Kind(
            SOUND, DIGITS, ("Which digit is said in the {which}sound?", "Write the digit of the {which}sound.")
        ),
        "spoken_colour": Kind(
            SOUND,
            tuple(COLOURS),
            ("Which colour is said in the {which}sound?", "Write the colour of the {which}sound."),
        ),
        "command": Kind(
            SOUND, COMMANDS, ("Which command is said in the {which}sound?", "Write the command of the {which}sound.")
        ),
        "words": Kind(
            SOUND, COUNTS[:4], ("How many words are said in the {which}sound?", "Count the words of the {which}sound.")
        ),
        "fact": Kind(TEXT, tuple(COLOURS), ("What colour is the {thing}?", "Name the colour of the {thing}.")),
    }
)

_WORDS = (*DIGITS, *COLOURS, *COMMANDS)
_THINGS = ("box", "lamp", "door", "cup", "chair", "boat", "roof", "coat")
_MIX = ((IMAGE,),) * 7 + ((SOUND,),) * 7 + ((IMAGE, SOUND),) * 2 + ((SOUND, IMAGE),) + ((TEXT,),) * 3
"""What the questions of a conversation are on; each as likely."""
_PAIR_PROBABILITY = 0.15
_SENTENCES = (
    "The train was late this morning and nobody knew why.",
    "A letter came with the post and lies on the table.",
    "We met at the station and walked along the river.",
    "It rained all night and the road is still wet.",
    "The library opens at noon and closes in the evening.",
    "My neighbour repairs old clocks in her kitchen.",
    "They planted trees behind the school last spring.",
    "The meeting takes place in the large room.",
    "Bread and cheese are enough for the journey.",
    "A ship with timber arrived in the harbour.",
    "Please keep this for the records of the office.",
    "The film was longer than everybody had expected.",
)


@dataclass(frozen=True, slots=True)
class Photograph:
    """A crop of a surface's photograph."""

    surface: str


@dataclass(frozen=True, slots=True)
class Speech:
    """Words that are spoken one after the other."""

    takes: tuple[Take, ...]


Medium = Photograph | Drawing | Speech


@dataclass(frozen=True, slots=True)
class Question:
    """A turn of the user's, and the answer that is right."""

    kind: str
    text: str
    answer: str
    media: tuple[Medium, ...]
    media_first: bool
    """Whether the pictures or sounds stand in front of the text."""


class Deck(Generic[T]):
    """Draws cards, each as often as any other: the deck is shuffled anew when it is empty."""

    def __init__(self, cards: Sequence[T], rng: np.random.Generator) -> None:
        self._cards = cards
        self._rng = rng
        self._left: list[T] = []

    def draw(self) -> T:
        """The next card."""
        if not self._left:
            self._left = [self._cards[place] for place in self._rng.permutation(len(self._cards))]
        return self._left.pop()


class Planner:
    """Plans the conversations of one part of the data set."""

    def __init__(self, rng: np.random.Generator, *, held_out: bool, text_words: float, text_spread: float) -> None:
        """``text_words``, ``text_spread``: median of the words around a question, deviation of their logarithm."""
        self._rng = rng
        self._held_out = held_out
        self._words = math.log(text_words), text_spread
        self._mix = Deck(_MIX, rng)
        self._kinds = {
            modality: Deck([name for name, kind in KINDS.items() if kind.modality == modality], rng)
            for modality in (IMAGE, SOUND, TEXT)
        }
        self._answers = {name: Deck(kind.answers, rng) for name, kind in KINDS.items()}

    def conversations(self, count: int) -> Iterator[list[Question]]:
        """So many conversations, each one or more questions."""
        for _ in range(count):
            yield [self._question(modality) for modality in self._mix.draw()]

    def _question(self, modality: str) -> Question:
        name = self._kinds[modality].draw()
        kind, answer = KINDS[name], self._answers[name].draw()
        asked = kind.questions[int(self._rng.integers(len(kind.questions)))]
        around = self._text_around()
        if modality == TEXT:
            facts, thing = self._facts(answer)
            return Question(name, f"{facts} {around}{asked.format(thing=thing)}", answer, (), media_first=True)
        media, which = [self._medium(name, answer)], ""
        if self._rng.random() < _PAIR_PROBABILITY:
            other = kind.answers[int(self._rng.integers(len(kind.answers)))]
            place = int(self._rng.integers(2))
            media.insert(1 - place, self._medium(name, other))
            which = ("first ", "second ")[place]
        text = around + asked.format(which=which)
        return Question(name, text, answer, tuple(media), media_first=bool(self._rng.random() < 0.5))

    def _text_around(self) -> str:
        """Sentences that have nothing to do with the question; the number of words is lognormal."""
        wanted = round(float(np.exp(self._rng.normal(*self._words))))
        words: list[str] = []
        while len(words) < wanted:
            words += _SENTENCES[int(self._rng.integers(len(_SENTENCES)))].split()
        if not wanted:
            return ""
        return f"{' '.join(words[:wanted]).rstrip('.')}. "

    def _facts(self, answer: str) -> tuple[str, str]:
        """Two things with their colours, and the one whose colour is ``answer``."""
        first, second = self._rng.choice(len(_THINGS), 2, replace=False)
        things, place = (_THINGS[int(first)], _THINGS[int(second)]), int(self._rng.integers(2))
        colours = [list(COLOURS)[int(self._rng.integers(len(COLOURS)))] for _ in things]
        colours[place] = answer
        return " ".join(f"The {thing} is {colour}." for thing, colour in zip(things, colours, strict=True)), things[
            place
        ]

    def _medium(self, kind: str, answer: str) -> Medium:
        """A picture or sound of which ``answer`` is right."""
        if kind == "surface":
            return Photograph(answer)
        if KINDS[kind].modality == IMAGE:
            drawn = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "count": COUNTS, kind: (answer,)}
            shape, colour, count = (drawn[each][int(self._rng.integers(len(drawn[each])))] for each in drawn)
            return Drawing(shape, colour, COUNTS.index(count) + 1)
        if kind == "words":
            spoken = [_WORDS[int(self._rng.integers(len(_WORDS)))] for _ in range(COUNTS.index(answer) + 1)]
        else:
            spoken = [answer]
        takes = HELD_OUT_TAKES if self._held_out else TAKES
        return Speech(tuple(Take(word, int(self._rng.integers(takes)), self._held_out) for word in spoken))
