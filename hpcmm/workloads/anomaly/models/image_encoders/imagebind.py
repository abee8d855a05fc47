"""ImageBind's vision tower: patch features of several depths, and whole images in the space of its texts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.image_encoders.clip import CLIP_MEAN, CLIP_STD, TINY_EMBEDDING_WIDTH
from hpcmm.workloads.anomaly.models.image_encoders.encoder import ImageEncoder, given_weights
from hpcmm.workloads.anomaly.models.image_encoders.tokens import choose_taps, tokens_to_map
from hpcmm.workloads.anomaly.models.imagebind import HEADS, VisionTower, load_vision_tower


class ImageBindEncoder(ImageEncoder):
    """One map a tapped block, all of one stride, the patch size; of the published weights blocks 7, 15, 23 and 31.

    Position embeddings are interpolated for other image sizes than the tower was trained with.
    """

    name = "ImageBind"
    mean = CLIP_MEAN
    std = CLIP_STD
    needs_weights = True

    def __init__(self, weights: str | None = None, taps: Sequence[int] = (), *, frozen: bool = True) -> None:
        """``weights``: a file in the layout of imagebind_huge.pth. Raises HpcmmError if it is not."""
        super().__init__()
        tower = self._load(weights)
        width, _, patch, _ = tower.patches.weight.shape
        if width % HEADS:
            raise HpcmmError(f"ImageBind's width must be a multiple of its {HEADS} heads, not {width}.")
        self.taps = choose_taps(taps, len(tower.blocks))
        self._patch = self.side_multiple = patch
        self.channels = (width,) * len(self.taps)
        self.strides = (patch,) * len(self.taps)
        self.embedding_width = tower.head.out_features
        self.tower = tower
        self.set_frozen(frozen, [*tower.blocks[self.taps[-1] + 1 :], tower.head_norm, tower.head])

    def _load(self, weights: str | None) -> VisionTower:
        return load_vision_tower(given_weights(weights, "imagebind"))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        states = self.tower(pixels, self.taps[-1] + 1)
        size = [side // self._patch for side in pixels.shape[-2:]]
        return [tokens_to_map(states[tap], size) for tap in self.taps]

    def embedding(self, pixels: Tensor) -> Tensor:
        return self.tower.embed(self.tower(pixels, len(self.tower.blocks))[-1])


class TinyImageBindEncoder(ImageBindEncoder):
    """Random weights: 4 blocks of width 96, patches of 8 pixels, for machines without weights.

    They come from the global random state; ``weights`` is of no effect.
    """

    needs_weights = False

    def _load(self, weights: str | None) -> VisionTower:  # noqa: ARG002 -- every encoder can be given some
        return VisionTower(width=96, depth=4, patch=8, places=64, embedding_width=TINY_EMBEDDING_WIDTH)
