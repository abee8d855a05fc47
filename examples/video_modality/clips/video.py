"""Videos for the omni-modal language model: a folder of frames, or an animated GIF or WebP."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from hpcmm.errors import HpcmmError
from hpcmm.files import entries_of
from hpcmm.workloads.omni.data.images import read_image
from hpcmm.workloads.omni.models.modalities.image import ImageModality

FRAMES = (".png", ".jpg", ".jpeg", ".bmp", ".tiff", ".webp")
HALF = (0.5, 0.5, 0.5)


class VideoModality(ImageModality):
    """Some frames of a video, spread evenly; each becomes tokens as an image does, plus the number of its place.

    Without ``weights`` the encoder is a small random ViT.
    """

    needs_weights = False
    upload_suffixes = (".gif", ".webp")

    def __init__(
        self,
        width: int,
        weights: str | None = None,
        *,
        most_frames: int = 8,
        most_tokens: int = 16,
        merge: int = 2,
        frozen: bool = False,
    ) -> None:
        """``most_tokens``: of a frame. Raises HpcmmError if the folder ``weights`` holds no such network."""
        super().__init__(width, weights, merge=merge, most_tokens=most_tokens, frozen=frozen)
        if most_frames < 1:
            raise HpcmmError(f"most_frames of a video must be at least 1, not {most_frames}.")
        self._most_frames = most_frames
        self.time = nn.Embedding(most_frames, width)
        nn.init.normal_(self.time.weight, std=0.02)

    def network(self, weights: str | None) -> tuple[Any, Sequence[float], Sequence[float]]:
        if weights is not None:
            return super().network(weights)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return ViTModel(ViTConfig(**sizes, patch_size=8, image_size=32), add_pooling_layer=False), HALF, HALF

    def read(self, path: Path) -> Tensor:
        """A folder of frames in the order of the numbers in their names, or an animation: (frames, 3, H, W) uint8."""
        pixels = list(self._of_folder(path) if path.is_dir() else self._of_animation(path))
        sizes = sorted({(width, height) for height, width, _ in (each.shape for each in pixels)})
        if not pixels:
            raise HpcmmError(f"The video {path} has no frame: put images in it ({', '.join(FRAMES)}).")
        if len(sizes) > 1:
            raise HpcmmError(f"The frames of {path} are of the sizes {sizes}: give a video's frames one size.")
        return torch.stack([self.prepare(each) for each in pixels])

    def count(self, prepared: Tensor) -> int:
        return len(prepared) * super().count(prepared)

    def example(self) -> Tensor:
        return super().example()[None]

    def forward(self, prepared: Sequence[Tensor]) -> Tensor:
        """Videos (frames, 3, H, W) to tokens (sum of their counts, width)."""
        tokens = super().forward([frame for video in prepared for frame in video])
        places = [torch.arange(len(each)).repeat_interleave(self.count(each) // len(each)) for each in prepared]
        timed: Tensor = tokens + self.time(torch.cat(places).to(tokens.device))
        return timed

    def _of_folder(self, path: Path) -> Iterator[NDArray[np.uint8]]:
        frames = sorted((each for each in entries_of(path) if each.suffix.lower() in FRAMES), key=_by_number)
        return (read_image(frames[number]) for number in self._spread(len(frames)))

    def _of_animation(self, path: Path) -> Iterator[NDArray[np.uint8]]:
        try:
            with Image.open(path, formats=("GIF", "WEBP")) as image:
                for number in self._spread(getattr(image, "n_frames", 1)):
                    image.seek(number)
                    yield np.array(image.convert("RGB"))
        except Exception as error:  # Pillow raises about anything, depending on where the damage lies
            raise HpcmmError(f"The video {path} cannot be read as a GIF or WebP: {error}; replace it.") from error

    def _spread(self, frames: int) -> list[int]:
        """The numbers of at most ``most_frames`` of so many frames, the first and the last among them."""
        return [round(each) for each in np.linspace(0, frames - 1, min(frames, self._most_frames))]


def _by_number(frame: Path) -> list[Any]:
    """``2.png`` comes before ``10.png``."""
    return [int(each) if each.isdecimal() else each for each in re.split(r"(\d+)", frame.name)]
