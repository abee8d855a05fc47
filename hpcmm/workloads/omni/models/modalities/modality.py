"""What every modality is: files in, tokens of the language model out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from hpcmm.workloads.omni.models.modalities.connector import Connector


class Modality(nn.Module, ABC):
    """Things of one kind, such as images, to tokens in the middle of a text.

    A loader calls :meth:`read` and :meth:`count`, which touch no parameter; :meth:`forward` runs on the rank's device.
    A subclass is built with ``width: int``, the length of the language model's embeddings; further parameters are
    plain values, from its YAML file. It calls :meth:`finish` at the end of its ``__init__``, and raises HpcmmError for
    what it cannot use.
    """

    key: str
    """What a conversation calls it, such as ``image``: its name in ``model.modalities``. The model sets it."""
    encoder: nn.Module
    connector: Connector

    needs_weights: ClassVar[bool] = False
    """Whether the parameter ``weights`` has to be given. Read from the source on the login node: a plain constant."""

    model_types: ClassVar[Sequence[str]] = ()
    """What ``weights`` may hold, by the ``model_type`` of ``transformers``; none for anything. Read as above."""

    upload_suffixes: ClassVar[Sequence[str] | None] = ()
    """The endings of files that a page's dialogue offers; none for any file. None if it takes no single file."""

    def finish(self, encoder: nn.Module, connector: Connector, *, frozen: bool, connector_frozen: bool) -> None:
        """Set the two parts and which of them train. A frozen encoder stays in evaluation mode."""
        self.encoder, self.connector = encoder, connector
        self._frozen = frozen
        if frozen:
            encoder.requires_grad_(False)
        connector.requires_grad_(not connector_frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Modality:
        super().train(mode)
        if self._frozen:
            self.encoder.eval()
        return self

    @abstractmethod
    def read(self, path: Path) -> Tensor:
        """A file to what the encoder takes, on the CPU. Raises HpcmmError if it cannot be read."""

    @abstractmethod
    def count(self, prepared: Tensor) -> int:
        """How many tokens :meth:`forward` makes of it, at least one."""

    @abstractmethod
    def example(self) -> Tensor:
        """The smallest thing that :meth:`read` could give, which a batch without any runs through."""

    @abstractmethod
    def forward(self, prepared: Sequence[Tensor]) -> Tensor:
        """Things to their tokens, one after another: (sum of their counts, width).

        All things of a batch go through each module together: the ranks of a job run through it equally often, however
        many things each has.
        """
