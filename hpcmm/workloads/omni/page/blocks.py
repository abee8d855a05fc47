"""The page: a conversation, and the message that is being written, in gradio's components.

Texts and files come into a message in the order in which the user gives them: a file takes the text that stands in the
box so far in front of it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from hpcmm.errors import HpcmmError
from hpcmm.serve.guard import FILES
from hpcmm.serve.served import escaped, heading, sentence, typed, user_name
from hpcmm.serve.service import Service
from hpcmm.serve.uploads import data_uri, sent_files
from hpcmm.workloads.omni.answering import Prompt
from hpcmm.workloads.omni.data.conversations import ASSISTANT, TEXT, Conversation, Part
from hpcmm.workloads.omni.data.encoding import TooLongError
from hpcmm.workloads.omni.models.answers import Written
from hpcmm.workloads.omni.page.served import Example, Message, OmniPage, Piece

MOST_CHARACTERS = 10_000
"""Of a text; more tokens than most models take."""
_USER = "user"
_STATE_LIFE_S = 1800
_WORDS_SHOWN = 60
_HINT = "Write something, or add a file, and send it. Texts and files keep the order in which you give them."

Shown = tuple[str, str, str, "Chat"]
"""The conversation, the message being written, what is left in the box, and the state."""


class Chat:
    """What one open page shows. It is changed in the server's event loop alone, in steps without a wait."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.draft: list[Piece] = []
        self.expected = ""
        """The data's own answer to the draft, as long as that is an example's."""
        self.waiting: Message | None = None
        """What is being answered."""
        self.begun = 0
        """How often it was begun anew: an answer to what was there before is dropped."""

    def begin(self, example: Example | None = None) -> None:
        """Begin anew, with nothing or with an example."""
        messages = list(example.messages) if example else []
        self.draft = list(messages.pop().pieces) if messages else []
        self.messages, self.expected, self.waiting = messages, example.expected if example else "", None
        self.begun += 1

    @property
    def files(self) -> list[Piece]:
        """All that were given so far."""
        given = [piece for message in self.messages for piece in message.pieces]
        return [piece for piece in [*given, *self.draft] if piece.part.type != TEXT]


class Talk:
    """What users do on the page."""

    def __init__(self, page: OmniPage, service: Service[Prompt, Written], examples: Sequence[Example]) -> None:
        self._page = page
        self._service = service
        self._examples = examples

    async def add(self, key: str, uploads: list[tuple[Path, str]], text: str, chat: Chat, user: str) -> Shown:
        """Put the text, and the files behind it, into the message."""
        problems: list[str] = []
        written, begun = _text(text, problems), chat.begun
        for path, name in uploads if not problems else ():
            try:
                piece = await self._service.logged(self._piece(key, path, name, chat), user=user, kind=key, file=name)
            except HpcmmError as error:
                problems.append(f"{name}: {error}")
                continue
            if begun == chat.begun:
                chat.draft += [*written, piece]
                chat.expected, written, text = "", [], ""
        return _shown(chat, problems, text)

    async def send(self, text: str, chat: Chat, user: str) -> AsyncIterator[Shown]:
        """Ask what was written, show it at once, and the answer when it is there."""
        problems: list[str] = []
        new = _text(text, problems)
        if chat.waiting is not None:
            problems.append("Your last message still waits for its answer: wait, or begin a new conversation.")
        elif not chat.draft and not new:
            problems.append("There is nothing to ask yet: write something, or add a file.")
        if problems:
            yield _shown(chat, problems, text)
            return
        expected = "" if new else chat.expected
        asked, begun = Message(_USER, (*chat.draft, *new)), chat.begun
        chat.draft, chat.expected, chat.waiting = [], "", asked
        yield _shown(chat)
        answer = None
        try:
            answer = await self._logged_answer([*chat.messages, asked], expected, user)
        except HpcmmError as error:
            problems.append(str(error))
        finally:
            if begun == chat.begun:
                chat.waiting = None
                if answer is None:  # whatever the reason is, the user has the message still
                    chat.draft, chat.expected = [*asked.pieces, *chat.draft], expected
                else:
                    chat.messages += [asked, answer]
        yield _shown(chat, problems)

    async def empty(self, chat: Chat) -> Shown:
        chat.draft, chat.expected = [], ""
        return _shown(chat)

    async def begin(self, chat: Chat) -> Shown:
        chat.begin()
        return _shown(chat)

    async def take(self, number: int | None, chat: Chat) -> Shown:
        """An example, whose last message is to be sent."""
        if number is not None and 0 <= number < len(self._examples):
            chat.begin(self._examples[number])
        return _shown(chat)

    async def _piece(self, key: str, path: Path, name: str, chat: Chat) -> tuple[Piece, dict[str, Any]]:
        most, most_tokens = self._service.options.max_files, self._page.max_tokens
        if len(chat.files) >= most:
            raise HpcmmError(f"A conversation may have at most {most} files: begin a new one.")
        piece = await self._service.prepared(lambda: self._page.piece(key, path, name))
        if piece.tokens + (before := sum(each.tokens for each in chat.files)) > most_tokens:
            raise HpcmmError(
                f"The {key} has {_tokens(piece.tokens)}, the files before it {before}, and a conversation may have "
                f"{most_tokens}: make it smaller or shorter, or begin a new conversation."
            )
        return piece, {"tokens": piece.tokens}

    async def _logged_answer(self, messages: Sequence[Message], expected: str, user: str) -> Message:
        last = messages[-1]
        asked = {
            "user": user,
            "kind": "conversation",
            "turn": len(messages),
            "parts": ", ".join(piece.part.type for piece in last.pieces),
            "files": ", ".join(piece.name for piece in last.pieces if piece.name),
            "question": last.text,
        }
        return await self._service.logged(self._answer(messages, expected), **asked)

    async def _answer(self, messages: Sequence[Message], expected: str) -> tuple[Message, dict[str, Any]]:
        conversation = Conversation(tuple(message.turn() for message in messages), "This conversation")
        began = time.monotonic()
        try:
            prompt = await self._service.prepared(lambda: self._page.answerer.prompt(conversation))
        except TooLongError as error:
            raise HpcmmError(
                "The conversation has more tokens than the model takes, images and sounds included: it may have "
                f"{self._page.max_tokens}, and needs room for an answer. Ask with less, or begin a new one."
            ) from error
        written = await self._service.ask(prompt)
        told = f"{time.monotonic() - began:.2f} s · {_tokens(written.tokens)}"
        if not written.ended:
            told += ", cut off there"
        answer = Message(ASSISTANT, (Piece(Part(TEXT, written.text)),), told, expected)
        return answer, {"prompt_tokens": prompt.tokens, "tokens": written.tokens, "words": written.text}


def fill_page(page: OmniPage, service: Service[Prompt, Written], cache: Path) -> None:
    """Add the components to the open Blocks. ``cache`` is the folder that files to be shown lie in."""
    examples = page.examples(cache)
    talk = Talk(page, service, examples)
    chat = gr.State(Chat(), time_to_live=_STATE_LIFE_S)
    gr.HTML(heading(page.name, page.about))
    talked = gr.HTML(sentence(_HINT), elem_id="conversation")
    draft = gr.HTML("", elem_id="draft")
    with gr.Row():
        box = gr.Textbox(label="Message", lines=1, max_lines=8, max_length=MOST_CHARACTERS, scale=6, elem_id="message")
        send = gr.Button("Send", variant="primary", elem_id="send", scale=1)
    with gr.Row():
        uploads = {key: _upload_button(key, suffixes) for key, suffixes in page.uploads.items()}
        empty = gr.Button("Empty the message", size="md", elem_id="empty")
        begin = gr.Button("New conversation", size="md", elem_id="begin")
    labels = [f"{place}. {each.kind}: {_start(each.messages[-1].text)}" for place, each in enumerate(examples, 1)]
    shown = [talked, draft, box, chat]

    async def ask(text: str, chat: Chat, request: gr.Request) -> AsyncIterator[Shown]:
        async for each in talk.send(text, chat, user_name(request.session_hash)):
            yield each

    gr.on([send.click, box.submit], ask, [box, chat], shown, api_visibility="private", api_name="ask")
    # What is quick goes past gradio's queue: a page that has two events in it at once can miss an answer for good.
    quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    for key, button in uploads.items():
        button.upload(_adding(talk, key), [button, box, chat], shown, api_name=f"add_{key}", **quick)
    empty.click(talk.empty, chat, shown, api_name="empty", **quick)
    begin.click(talk.begin, chat, shown, api_name="begin", **quick)
    if labels:
        choice = gr.Dropdown(
            labels,
            value=None,
            type="index",
            label="Or take a held-out conversation of the data",
            elem_id="examples",
        )
        choice.input(talk.take, [choice, chat], shown, api_name="take", **quick)


def _adding(talk: Talk, key: str) -> Any:
    async def add(sent: list[tuple[Path, str]], text: str, chat: Chat, request: gr.Request) -> Shown:
        return await talk.add(key, sent, text, chat, user_name(request.session_hash))

    return add


def _upload_button(key: str, suffixes: list[str]) -> Any:
    button = gr.UploadButton(
        f"Add {key}", file_count="multiple", file_types=suffixes or None, size="md", elem_id=f"add-{key}"
    )
    button.preprocess = sent_files
    return button


def _text(given: str, problems: list[str]) -> list[Piece]:
    """What stands in the box, if anything does; what is wrong with it goes to ``problems``."""
    try:
        text = typed(given, "one text", MOST_CHARACTERS)
    except HpcmmError as error:
        problems.append(str(error))
        return []
    return [Piece(Part(TEXT, text))] if text else []


def _shown(chat: Chat, problems: Sequence[str] = (), left: str = "") -> Shown:
    said = "".join(sentence(problem, "problem") for problem in problems)
    return _conversation(chat), _draft(chat) + said, left, chat


def _conversation(chat: Chat) -> str:
    messages = [*chat.messages, *([chat.waiting] if chat.waiting else [])]
    if not messages:
        return sentence(_HINT)
    waits = '<p class="hpcmm-small" role="status">The model is writing.</p>' if chat.waiting else ""
    return "".join(map(_message, messages)) + waits


def _draft(chat: Chat) -> str:
    if not chat.draft:
        return ""
    return f'<section class="hpcmm-turn"><div class="hpcmm-role">your message</div>{_pieces(chat.draft)}</section>'


def _message(message: Message) -> str:
    who = {_USER: "you", ASSISTANT: "the model"}.get(message.role, message.role)
    expected = f'<p class="hpcmm-small">expected: {escaped(message.expected)}</p>' if message.expected else ""
    told = f'<p class="hpcmm-small">{escaped(message.told)}</p>' if message.told else ""
    return (
        f'<section class="hpcmm-turn hpcmm-{message.role}"><div class="hpcmm-role">{who}</div>'
        f"{_pieces(message.pieces)}{told}{expected}</section>"
    )


def _pieces(pieces: Sequence[Piece]) -> str:
    return "".join(map(_piece, pieces))


def _piece(piece: Piece) -> str:
    """A text, or a file with its picture, or with a player of the browser's own."""
    if piece.part.type == TEXT:
        lines = "<br>".join(escaped(line) for line in piece.part.text.expandtabs().splitlines())
        return f"<p>{lines or '(nothing)'}</p>"
    name = escaped(piece.name)
    picture = f'<img src="{data_uri(piece.picture)}" alt="{name}">' if piece.picture else ""
    if piece.part.path is not None and piece.part.path.suffix.lower() == ".wav":
        picture = f'<audio controls preload="none" src="{escaped(FILES + quote(str(piece.part.path)))}"></audio>'
    noted = f" · {escaped(piece.note)}" if piece.note else ""
    return (
        f'<figure data-type="{escaped(piece.part.type)}">{picture}<figcaption>{name}{noted} · '
        f"{_tokens(piece.tokens)}</figcaption></figure>"
    )


def _tokens(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"


def _start(text: str) -> str:
    return text if len(text) <= _WORDS_SHOWN else f"{text[:_WORDS_SHOWN]}..."
