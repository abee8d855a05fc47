"""A tiny omni-modal model, and batches for it, for tests of the model and of recipes that cut it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hpcmm.train.structure import NO_LABEL
from hpcmm.workloads.omni.data.batch import Answer, Batch, ModalityBatch, pack
from hpcmm.workloads.omni.models import OmniModel, build_model
from hpcmm.workloads.omni.schema import LanguageModelConfig, ModelConfig, TinyConfig

_CLASSES = "hpcmm.workloads.omni.models.modalities"
IMAGE = {"_target_": f"{_CLASSES}.image.TinyImageModality", "channels": 32, "layers": 1, "side": 32}
SOUND = {"_target_": f"{_CLASSES}.sound.TinySoundModality", "channels": 32, "layers": 1, "bands": 16, "window_s": 1.0}


def tiny_config(
    architecture: str = "llama",
    *,
    modalities: dict[str, dict[str, Any]] | None = None,
    language: dict[str, Any] | None = None,
    **sizes: int,
) -> ModelConfig:
    """``sizes``: those of ``TinyConfig`` (layers, width, heads, kv_heads, experts, ...); ``language``: further keys of
    ``LanguageModelConfig``, such as ``frozen``."""
    words = LanguageModelConfig(architecture=architecture, tiny=TinyConfig(**sizes), **(language or {}))
    return ModelConfig(words, {"image": IMAGE, "sound": SOUND} if modalities is None else modalities)


def tiny_model(architecture: str = "llama", seed: int = 0, **options: Any) -> OmniModel:
    """A random model; ``options`` as of :func:`tiny_config`."""
    return build_model(tiny_config(architecture, **options), seed)


def random_batch(
    model: OmniModel, seed: int = 0, things: Sequence[Sequence[str]] = (("image", "sound"), (), ("image",))
) -> Batch:
    """One packed row. ``things``: for each example what stands between its words, such as ``("image", "sound")``.

    Images and sounds are of random sizes; the last words of each example are labelled.
    """
    rng = np.random.default_rng(seed)
    return pack([random_example(model, rng, own) for own in things])


def random_example(model: OmniModel, rng: np.random.Generator, things: Sequence[str]) -> Batch:
    """One example as a row of its own."""
    tokens: list[int] = rng.integers(2, 258, rng.integers(2, 6)).tolist()
    found: dict[str, tuple[list[torch.Tensor], list[int]]] = {key: ([], []) for key in model.modalities}
    for key in things:
        modality = model.modalities[key]
        prepared = _random_thing(modality, rng)
        own, places = found[key]
        own.append(prepared)
        count = modality.count(prepared)
        places += range(len(tokens), len(tokens) + count)
        tokens += [0] * count + rng.integers(2, 258, rng.integers(1, 4)).tolist()
    answer: list[int] = rng.integers(2, 258, rng.integers(2, 5)).tolist()
    labels = [NO_LABEL] * (len(tokens) - 1) + answer + [NO_LABEL]
    row = torch.tensor([tokens + answer])
    return Batch(
        tokens=row,
        positions=torch.arange(row.shape[1])[None],
        labels=torch.tensor([labels]),
        modalities={
            key: ModalityBatch(own, torch.tensor(places, dtype=torch.int64)) for key, (own, places) in found.items()
        },
        answers=(Answer("", things[0] if things else "text", len(answer)),),
    )


def _random_thing(modality: Any, rng: np.random.Generator) -> torch.Tensor:
    example = modality.example()
    if example.dtype == torch.uint8:
        *frames, _, height, width = example.shape  # a video has some more
        frames = [each * int(rng.integers(1, 4)) for each in frames]
        size = (*frames, 3, height * int(rng.integers(1, 4)), width * int(rng.integers(1, 4)))
        return torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
    bands, frames = example.shape
    return torch.from_numpy(rng.normal(size=(bands, frames * int(rng.integers(1, 25)))).astype(np.float32))
