"""Turns as the text that a language model was tuned on: by its tokenizer's chat template, or plainly.

The template is rendered once for each order of roles, with a word that stands for each turn's content. So a template
sees no content, and content cannot change what the template writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.text import visible
from hpcmm.workloads.omni.data.conversations import ASSISTANT, TEXT, Conversation, Part, Turn

Roles = tuple[str, ...]

_PLAIN = {"system": "", "user": "User: ", ASSISTANT: "Assistant:"}
"""What stands before a turn if there is no template. An answer's own space follows, for tokens begin with one."""


@dataclass(frozen=True, slots=True)
class Span:
    """Text that is made into tokens as a whole, or a file of a modality."""

    part: Part
    answer: int | None = None
    """The number of the turn whose answer it belongs to; None of what is not to be learnt."""
    joins: bool = True
    """Whether it goes on with the text before it, if that is of the same answer."""
    after: str = ""
    """The text right before it, for some tokenizers put a space in front of what has none."""


class ChatFormat:
    """How a tokenizer's model wants turns to be written, and which of it is the assistant's."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: one of ``transformers``. Raises HpcmmError if it has no token that ends an answer."""
        if tokenizer.eos_token is None:
            raise HpcmmError(
                "The tokenizer has no eos_token, which ends an answer: name one in its tokenizer_config.json."
            )
        self._tokenizer = tokenizer
        self._is_plain = not tokenizer.chat_template
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(re.escape(each) for each in sorted(special, key=len, reverse=True)))
        self._rendered: dict[Roles, tuple[str, ...]] = {}

    def spans(self, conversation: Conversation) -> list[Span]:
        """The conversation up to the end of its last answer. Text is cut where an answer begins and ends.

        So the tokens in front of an answer are those that a model is given when it is to write one. Raises HpcmmError
        if the template cannot write turns of these roles.
        """
        spans = self._joined(conversation, conversation.roles)
        while spans and spans[-1].answer is None:  # nothing is learnt from it
            spans.pop()
        return list(_in_context(spans))

    def prompt(self, conversation: Conversation) -> list[Span]:
        """What a model is given to write one more turn, an answer. It writes the space before a word itself."""
        answer = Span(Part(TEXT, "?"), len(conversation.turns))
        return list(_in_context([*self._joined(conversation, (*conversation.roles, ASSISTANT)), answer]))[:-1]

    def stop_tokens(self, conversation: Conversation) -> list[int]:
        """The tokens of which each ends the answer that follows the conversation."""
        end = self._end((*conversation.roles, ASSISTANT), conversation.origin)
        return sorted({self._tokenizer.eos_token_id, self._tokens(end)[-1]})

    def tokens(self, span: Span) -> list[int]:
        """The tokens that a text has behind the text before it, with none added."""
        if span.after:
            before, whole = self._tokens(span.after), self._tokens(span.after + span.part.text)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return self._tokens(span.part.text)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _joined(self, conversation: Conversation, roles: Roles) -> list[Span]:
        joined: list[Span] = []
        for span in self._pieces(conversation, roles):
            last = joined[-1] if joined else None
            if last and span.joins and span.answer == last.answer and span.part.type == last.part.type == TEXT:
                joined[-1] = replace(last, part=Part(TEXT, last.part.text + span.part.text))
            elif span.part.text or span.part.type != TEXT:
                joined.append(span)
        return joined

    def _pieces(self, conversation: Conversation, roles: Roles) -> Iterator[Span]:
        """The template's text and the contents in turn."""
        around, done = self._around(roles, conversation.origin), ""
        for number, turn in enumerate(conversation.turns):
            yield _literal(around[number].removeprefix(done))
            answer, done = (number if turn.role == ASSISTANT else None), ""
            if answer is not None and self._is_plain:
                yield _literal(" ", answer)
            yield from self._content(turn, answer)
            if answer is not None:
                done = self._end(roles[: number + 1], conversation.origin)
                yield _literal(done, answer)
        yield _literal(around[len(conversation.turns)].removeprefix(done))

    def _content(self, turn: Turn, answer: int | None) -> Iterator[Span]:
        """A turn's texts and files. A special token that a text spells is cut in two, so that it is none."""
        for kind, parts in groupby(turn.content, key=lambda part: part.type):
            if kind != TEXT:
                yield from (Span(part, answer) for part in parts)
                continue
            text, start = "".join(part.text for part in parts), 0
            for found in self._special.finditer(text) if self._special.pattern else ():
                cut = found.start() + 1
                yield Span(Part(TEXT, text[start:cut]), answer, joins=start == 0)
                start = cut
            yield Span(Part(TEXT, text[start:]), answer, joins=start == 0)

    def _end(self, roles: Roles, origin: str) -> str:
        """What ends the last of these turns, an answer: the template's text up to its first special token.

        The token ``eos`` if the template writes none, for else a model would not learn to stop.
        """
        behind = self._around(roles, origin)[-1]
        found = self._special.search(behind) if self._special.pattern else None
        return behind[: found.end()] if found else str(self._tokenizer.eos_token)

    def _around(self, roles: Roles, origin: str) -> tuple[str, ...]:
        """What is written before each turn's content and, as one more, behind the last."""
        if roles not in self._rendered:
            self._rendered[roles] = self._plain(roles) if self._is_plain else self._of_template(roles, origin)
        return self._rendered[roles]

    def _plain(self, roles: Roles) -> tuple[str, ...]:
        eos, bos = self._tokenizer.eos_token, self._tokenizer.bos_token or ""
        ends = ["", *(eos if role == ASSISTANT else "" for role in roles)]
        begins = [*(f"{chr(10) if number else bos}{_PLAIN[role]}" for number, role in enumerate(roles)), ""]
        return tuple(end + begin for end, begin in zip(ends, begins, strict=True))

    def _of_template(self, roles: Roles, origin: str) -> tuple[str, ...]:
        words = [f"content-{number}-of-turns" for number in range(len(roles))]
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        try:
            rest = self._tokenizer.apply_chat_template(messages, tokenize=False)  # in jinja's sandbox
        except Exception as error:
            raise HpcmmError(
                f"{origin}: the tokenizer's chat template cannot write the turns {_named(roles)}: "
                f"{visible(str(error).partition(chr(10))[0])}. Change these turns, or the template."
            ) from error
        around = []
        for number, word in enumerate(words):
            before, found, rest = rest.partition(word)
            if not found or word in rest:
                raise HpcmmError(
                    f"{origin}: the tokenizer's chat template leaves out, moves or repeats turn {number + 1} of the "
                    f"turns {_named(roles)}. Change these turns, or the template."
                )
            around.append(before)
        return (*around, rest)


def _literal(text: str, answer: int | None = None) -> Span:
    return Span(Part(TEXT, text), answer)


def _in_context(spans: Sequence[Span]) -> Iterator[Span]:
    """The spans, each text with the one before it. The spaces in front of an answer are made its own.

    For they are part of a word's token, which a model is to write.
    """
    before, spaces = "", ""
    for span, following in zip(spans, [*spans[1:], None], strict=True):
        if span.part.type != TEXT:
            before, spaces = "", ""
            yield span
            continue
        text = kept = spaces + span.part.text
        if span.answer is None and following and following.answer is not None and following.part.type == TEXT:
            kept = text.rstrip(" ")
        yield replace(span, part=Part(TEXT, kept), after=before if span.joins else "")
        before, spaces = kept, text[len(kept) :]


def _named(roles: Sequence[str]) -> str:
    return ", ".join(roles)
