"""What every image encoder is: images in, feature maps out, frozen or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.pixels import CHANNEL_MEAN, CHANNEL_STD


class ImageEncoder(nn.Module, ABC):
    """Images (B, 3, H, W), in the scale of :mod:`hpcmm.workloads.anomaly.pixels`, to maps
    (B, channels[i], H / strides[i], W / strides[i]).

    The maps are ordered from the finest on, and their sizes are rounded up. An encoder stays in evaluation mode, so
    that dropout is off and batch normalisation keeps the statistics that came with the weights: a rank's few images
    could not give better ones. Frozen, it has no gradients either.

    A subclass is built with ``weights: str | None``, the file or folder of its weights, ``taps: Sequence[int]``, the
    blocks that give maps (empty: its own choice), and ``frozen: bool``; further parameters are plain values with
    defaults. It raises HpcmmError for what it cannot use.
    """

    name: str
    """As messages call it."""
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    side_multiple: int
    """H and W must be multiples of it."""
    embedding_width: int | None = None
    """Length of :meth:`embed`'s vectors; None if the encoder shares no space with texts."""
    mean: Sequence[float] = (CHANNEL_MEAN,) * 3
    std: Sequence[float] = (CHANNEL_STD,) * 3
    """Of each channel, for values from 0 to 1: the scale that the weights were trained with."""

    needs_weights: ClassVar[bool] = False
    """Whether ``model.image_weights`` has to be given. Read from the source on the login node, so a plain constant."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False

    def set_frozen(self, frozen: bool, beyond: Sequence[nn.Module] = ()) -> None:
        """Called once all parameters are there. ``beyond``: parts that no map depends on, so that none can train
        them."""
        self.frozen = frozen
        self.requires_grad_(not frozen)
        for part in beyond:
            part.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> ImageEncoder:  # noqa: ARG002 - nn.Module's signature
        """Stay in evaluation mode whatever ``mode`` says."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raises HpcmmError for images whose sides the encoder cannot take."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.maps(self._own_scale(images))

    def embed(self, images: Tensor) -> Tensor:
        """Images to unit vectors (B, embedding_width), float32, in the space of the texts.

        Raises HpcmmError if there is no such space.
        """
        if self.embedding_width is None:
            raise HpcmmError(
                f"{self.name} embeds no whole image: take an encoder that shares a space with texts (clip)."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return functional.normalize(self.embedding(self._own_scale(images)).float(), dim=1)

    @abstractmethod
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Pixels in the encoder's own scale and number format to the maps."""

    def embedding(self, pixels: Tensor) -> Tensor:
        """Pixels in the encoder's own scale to (B, embedding_width), not normalised."""
        raise NotImplementedError

    def _own_scale(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.side_multiple or width % self.side_multiple:
            raise HpcmmError(
                f"{self.name} needs images whose sides are multiples of {self.side_multiple} pixels, "
                f"not {height} x {width}; change data.image_size."
            )
        scale = [CHANNEL_STD / std for std in self.std]
        shift = [(CHANNEL_MEAN - mean) / std for mean, std in zip(self.mean, self.std, strict=True)]
        if any(factor != 1 for factor in scale) or any(shift):
            images = images * images.new_tensor(scale)[:, None, None] + images.new_tensor(shift)[:, None, None]
        return images.to(next(self.parameters()).dtype)


def given_weights(weights: str | None, encoder: str) -> Path:
    """``model.image_weights`` as a path. Raises HpcmmError if ``encoder``, as ``model=`` names it, lacks it."""
    if weights is None:
        raise HpcmmError(
            f"model.image_weights is not given: name the folder or file of {encoder}'s weights, or take a "
            f"small random one of the same kind with model={encoder}_tiny."
        )
    return Path(weights).expanduser()
