"""Which conversations a rank reads, in which order, and what becomes of those that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpcmm.errors import HpcmmError
from hpcmm.train.sampling import EndlessSampler
from hpcmm.workloads.omni.data.batch import Batch, pack, pad
from hpcmm.workloads.omni.data.conversations import Conversation, ConversationFile
from hpcmm.workloads.omni.data.encoding import Encoder
from hpcmm.workloads.omni.schema import OmniDataConfig, OnError

log = logging.getLogger("hpcmm.workloads.omni.data")


class TrainExamples(Dataset[Batch]):
    """The conversations of a file as examples, without end: number ``epoch * len + i`` is conversation i.

    With ``data.on_error=skip`` the next one that can be used takes the place of one that cannot.
    """

    def __init__(self, conversations: ConversationFile, encoder: Encoder, on_error: OnError) -> None:
        self._conversations = conversations
        self._encoder = encoder
        self._refuse = on_error is OnError.refuse
        flags: Tensor = torch.zeros(len(conversations), dtype=torch.uint8)
        self.skipped = flags.share_memory_()  # type: ignore[no-untyped-call]
        """(conversations,), uint8, ones for those that could not be used; shared with a loader's processes."""

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Batch:
        """Raises HpcmmError for one that cannot be used, with ``skip`` if none can."""
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return self._encoder.example(self._conversations[place])
            except HpcmmError as error:
                self._note(place, error)
        raise HpcmmError(
            f"None of the {len(self)} conversations of {self._conversations.path} can be used; see the warnings before."
        )

    def __iter__(self) -> Iterator[Batch]:
        """One epoch; without it, going on past the end would make a ``for`` loop endless."""
        return (self[index] for index in range(len(self)))

    def _note(self, place: int, error: HpcmmError) -> None:
        """Raise ``error``, or say it, unless it was said before."""
        if self._refuse:
            raise error
        if not self.skipped[place]:
            self.skipped[place] = 1
            log.warning("%s The next one takes its place, as data.on_error says.", error)


class TestExamples(Dataset[Batch]):
    """The conversations that are scored.

    With ``data.on_error=skip`` each is read once when the set is built, and those that cannot be used are left out, so
    that all ranks agree on what is scored.
    """

    __test__ = False  # for pytest, which takes the name for a test's

    def __init__(self, conversations: ConversationFile, encoder: Encoder, on_error: OnError) -> None:
        self._conversations = conversations
        self._encoder = encoder
        self._places: Sequence[int] = range(len(conversations))
        if on_error is OnError.skip:
            self._places = [place for place in self._places if self._is_usable(place)]
            log.info("%d of %d conversations are scored.", len(self._places), len(conversations))
        if not self._places:
            raise HpcmmError(f"No conversation of {conversations.path} can be used; see the warnings before.")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Batch:
        """Raises IndexError past the end, HpcmmError for one that cannot be used."""
        return self._encoder.example(self.conversation(index))

    def conversation(self, index: int) -> Conversation:
        """Example ``index`` as it was written."""
        conversation: Conversation = self._conversations[self._places[index]]
        return conversation

    def _is_usable(self, place: int) -> bool:
        try:
            self._encoder.example(self._conversations[place])
        except HpcmmError as error:
            log.warning("%s It is left out of the scores, as data.on_error says.", error)
            return False
        return True


class Loading:
    """How a rank reads micro-batches; the same order of examples whatever the number of loader processes."""

    def __init__(self, data: OmniDataConfig, seed: int, *, pin_memory: bool) -> None:
        self._settings: dict[str, Any] = {
            "collate_fn": pack if data.packed else pad,
            "num_workers": data.num_workers,
            "prefetch_factor": data.prefetch_batches if data.num_workers else None,
            "pin_memory": pin_memory,
        }
        self._seed = seed

    def endless(
        self, examples: TrainExamples, micro_batch_size: int, rank: int, world_size: int, first: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches of the training set, from number ``first`` on."""
        sampler = EndlessSampler(len(examples), micro_batch_size, rank, world_size, self._seed, first)
        return iter(DataLoader(examples, batch_sampler=sampler, generator=self._generator(), **self._settings))

    def once(self, examples: TestExamples, places: Sequence[int], micro_batch_size: int) -> Iterator[Batch]:
        """Examples ``places``, in their order; the last micro-batch may be smaller."""
        batches = [list(places[start : start + micro_batch_size]) for start in range(0, len(places), micro_batch_size)]
        return iter(DataLoader(examples, batch_sampler=batches, generator=self._generator(), **self._settings))

    def _generator(self) -> torch.Generator:
        """A loader draws a number when it starts: from the global state, a resumed run would be one number ahead."""
        return torch.Generator().manual_seed(self._seed)
