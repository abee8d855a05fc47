"""The page of the omni-modal language model to ``hpcmm.serve``: a run's model, and what users bring it.

One line of data: an upload -> ``OmniPage.piece`` (checked, read) -> ``Answerer.prompt`` -> ``OmniPage.predict``,
through the server's batcher -> ``blocks``, the gradio page.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcmm.errors import HpcmmError
from hpcmm.files import read_followed
from hpcmm.runs.run_dir import RunDir, newest_checkpoint
from hpcmm.serve.options import ServeOptions, check_whole_number
from hpcmm.serve.served import ServedModel, ServedPage
from hpcmm.serve.service import Service
from hpcmm.text import printable
from hpcmm.workloads.omni.data.conversations import ASSISTANT, TEST, TEXT, Conversation, ConversationFile, Part, Turn
from hpcmm.workloads.omni.schema import OmniConfig

if TYPE_CHECKING:
    from hpcmm.workloads.omni.answering import Answerer, Prompt
    from hpcmm.workloads.omni.models import OmniModel
    from hpcmm.workloads.omni.models.answers import Written
    from hpcmm.workloads.omni.models.modalities.modality import Modality

CSS = Path(__file__).with_name("page.css")
MOST_EXAMPLES = 12
_LOOKED_AT = 2000
"""Held-out conversations from which the examples are taken, one of each kind."""
_SMALL_SIDE = 320
"""Of an image within the page, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """Settings of this page. Raises HpcmmError for values that cannot be used."""

    max_new_tokens: int = 128
    """Of one answer."""

    def __post_init__(self) -> None:
        check_whole_number("max_new_tokens", self.max_new_tokens, 100_000)


@dataclass(frozen=True, slots=True)
class Piece:
    """A text or a file of a message, read and checked, and what the page shows of it."""

    part: Part
    name: str = ""
    """That of the file."""
    tokens: int = 0
    """Those that the file takes in the conversation."""
    note: str = ""
    picture: bytes = b""
    """JPEG, shrunk for the page; of an image."""


@dataclass(frozen=True, slots=True)
class Message:
    """One side's turn. ``told`` and ``expected``: how an answer came about, and that of the data if it is known."""

    role: str
    pieces: tuple[Piece, ...]
    told: str = ""
    expected: str = ""

    @property
    def text(self) -> str:
        return " ".join(piece.part.text for piece in self.pieces if piece.part.type == TEXT)

    def turn(self) -> Turn:
        return Turn(self.role, tuple(piece.part for piece in self.pieces))


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out conversation: the last message is the user's, and ``expected`` answers it."""

    messages: tuple[Message, ...]
    expected: str
    kind: str


class ServedOmni(ServedModel):
    """Conversations of text, images and sounds."""

    description = "talk with it in text, images and sounds"

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of one answer (default: 128)")

    def options(self, given: Namespace) -> dict[str, Any]:
        most = given.max_new_tokens
        return asdict(PageOptions() if most is None else PageOptions(max_new_tokens=most))

    def build_model(self, config: OmniConfig) -> OmniModel:
        from hpcmm.workloads.omni.answering import model_of  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.omni.folders import prepare_to_answer  # noqa: PLC0415 -- SciPy

        prepare_to_answer(config)
        return model_of(config)

    def load(self, model: OmniModel, run: RunDir, config: OmniConfig, options: ServeOptions) -> OmniPage:
        import torch  # noqa: PLC0415 -- takes seconds

        from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.omni.answering import Answerer  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.omni.evaluation import OmniEvaluation  # noqa: PLC0415 -- pandas

        about = f"{OmniEvaluation().model_name(config)} · checkpoint {newest_checkpoint(run)}"
        made = "" if config.data.root else " Trained on made conversations: its answers say nothing about real ones."
        return OmniPage(
            Answerer(model, config, torch.device(select_accelerator())),
            model.readers(),
            options,
            name=run.root.name,
            about=f"{about} · takes {_listed([TEXT, *model.readers()])} · always the likeliest token.{made}",
            max_tokens=config.data.max_tokens,
            held_out=_held_out(config, model.readers()),
        )


class OmniPage(ServedPage):
    """One run's model, and how what users bring becomes part of a conversation."""

    css = CSS.read_text(encoding="utf-8")

    def __init__(
        self,
        answerer: Answerer,
        modalities: Mapping[str, Modality],
        options: ServeOptions,
        *,
        name: str,
        about: str,
        max_tokens: int,
        held_out: Sequence[Conversation],
    ) -> None:
        self.answerer = answerer
        self.limits = options
        self.name, self.about, self.max_tokens = name, about, max_tokens
        self.uploads = {
            key: list(modality.upload_suffixes)
            for key, modality in modalities.items()
            if modality.upload_suffixes is not None
        }
        """The types of files that can be uploaded, with the endings that they have; none for any."""
        self._max_new_tokens = PageOptions(**options.page).max_new_tokens
        self._modalities = modalities
        self._held_out = held_out

    def predict(self, requests: Sequence[Prompt]) -> list[Written]:
        return self.answerer.write(requests, self._max_new_tokens)

    def build(self, service: Service[Prompt, Written], cache: Path) -> None:
        from hpcmm.workloads.omni.page.blocks import fill_page  # noqa: PLC0415 -- gradio takes seconds

        fill_page(self, service, cache)

    def piece(self, key: str, path: Path, name: str) -> Piece:
        """An uploaded file as a piece of a message, ready for the encoder of its modality.

        Raises HpcmmError with a sentence for whoever uploaded it.
        """
        from hpcmm.workloads.omni.models.modalities.image import ImageModality  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.omni.models.modalities.sound import SoundModality  # noqa: PLC0415 -- imports torch

        modality, note, picture = self._modalities[key], "", b""
        read = type(modality).read  # a class that overrides it reads files of another kind, such as videos
        if isinstance(modality, ImageModality) and read is ImageModality.read:
            import numpy as np  # noqa: PLC0415 -- as Pillow, --help does not need it

            from hpcmm.serve.uploads import jpeg, open_upload  # noqa: PLC0415 -- imports Pillow

            uploaded = open_upload(path, self.limits)
            prepared = modality.prepare(np.array(uploaded.image))
            uploaded.image.thumbnail((_SMALL_SIDE, _SMALL_SIDE))
            note, picture = uploaded.note, jpeg(uploaded.image)
        else:
            self.limits.check_upload(path)
            if isinstance(modality, SoundModality) and read is SoundModality.read:
                note = _checked_sound(path, modality.most_s)
            prepared = _read(key, modality, path, name)
        tokens = modality.count(prepared)
        if tokens < 1:
            raise HpcmmError(f"The {key} is too small to make one token of it.")
        return Piece(Part(key, path=path, prepared=prepared), name, tokens, note, picture)

    def examples(self, cache: Path) -> list[Example]:
        """Held-out conversations, as if users had uploaded their files. What cannot be uploaded is left out, and said.

        The files are copied into ``cache``, from which alone the page may show some.
        """
        found = []
        for number, conversation in enumerate(self._held_out):
            try:
                folder = cache / "held_out" / str(number)
                folder.mkdir(mode=0o700, parents=True)
                messages = [self._message(turn, folder / str(place)) for place, turn in enumerate(conversation.turns)]
            except (HpcmmError, OSError) as error:
                _say(f"{conversation.origin} is no example: {error}")
                continue
            answer = messages.pop()
            found.append(Example(tuple(messages), answer.text, conversation.turns[-1].kind))
        return found

    def _message(self, turn: Turn, folder: Path) -> Message:
        return Message(turn.role, tuple(self._copied(part, folder / str(at)) for at, part in enumerate(turn.content)))

    def _copied(self, part: Part, folder: Path) -> Piece:
        if part.path is None:
            return Piece(part)
        if part.type not in self.uploads or not part.path.is_file():
            raise HpcmmError(f"{part.path} is of a type that cannot be uploaded.")
        self.limits.check_upload(part.path)
        folder.mkdir(mode=0o700, parents=True)
        copy = folder / part.path.name
        copy.write_bytes(read_followed(part.path, self.limits.max_upload_bytes))
        return self.piece(part.type, copy, copy.name)


def _checked_sound(path: Path, most_s: float) -> str:
    """A note on the sound. Raises HpcmmError for one that is none, or too long, before a sample is read."""
    from hpcmm.workloads.omni.data.sounds import sound_header  # noqa: PLC0415 -- NumPy

    try:
        header = sound_header(path)
    except OSError as error:
        raise HpcmmError("The file is no longer here: upload it again.") from error
    if header.seconds > most_s:
        raise HpcmmError(
            f"The sound has {header.seconds:.1f} s, and at most {most_s:g} s are taken: cut it into shorter ones."
        )
    return f"{header.seconds:.1f} s"


def _read(key: str, modality: Modality, path: Path, name: str) -> Any:
    """What the modality's own class reads of a file. Raises HpcmmError whatever it raises."""
    try:
        return modality.read(path)
    except HpcmmError as error:
        raise HpcmmError(str(error).replace(str(path), name)) from error
    except Exception as error:  # a decoder may raise whatever a hostile file leads it to
        _say(f"an uploaded {key} was not read: {type(error).__name__}: {error}")
        raise HpcmmError(
            f"The {key} cannot be read: it is damaged, or stored in a way that is not known. Save it anew."
        ) from error


def _held_out(config: OmniConfig, modalities: Mapping[str, Modality]) -> list[Conversation]:
    """One of each kind of answer; none, and a line that says so, if the data is not at hand."""
    from hpcmm.workloads.omni.folders import conversations_folder  # noqa: PLC0415 -- SciPy

    found: dict[str, Conversation] = {}
    unusable: list[str] = []
    try:
        file = ConversationFile(conversations_folder(config) / TEST, modalities)
    except (HpcmmError, OSError) as error:
        _say(f"no examples: {error}")
        return []
    for place in range(min(len(file), _LOOKED_AT)):
        try:
            conversation = file[place]
        except HpcmmError as error:
            unusable.append(str(error))
            continue
        turns = conversation.turns
        if [turn.role for turn in turns[-2:]] == ["user", ASSISTANT]:
            found.setdefault(turns[-1].kind, conversation)
    if unusable:
        _say(f"{len(unusable)} held-out conversations cannot be used: {unusable[0]}")
    return list(found.values())[:MOST_EXAMPLES]


def _say(text: str) -> None:
    print(f"hpcmm.serve: {printable(text[:400])}", file=sys.stderr, flush=True)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
