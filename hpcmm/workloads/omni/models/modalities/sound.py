"""Sounds: their spectrogram in short windows through Whisper's encoder; a sound costs as much as it is long."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.sounds import LONGEST_S, read_sound
from hpcmm.workloads.omni.models.modalities.connector import Connector
from hpcmm.workloads.omni.models.modalities.merging import merged_runs
from hpcmm.workloads.omni.models.modalities.modality import Modality
from hpcmm.workloads.pretrained import load_pretrained, model_type_of

RATE_HZ = 16_000
HOP = 160
"""Samples between two frames of the spectrogram: 10 ms."""
FRAMES_PER_STATE = 2
"""The encoder halves the frames: a state stands for 20 ms."""
_QUIETEST = 2.0
"""How far the spectrogram's floor lies below its peak, as Whisper scales it."""
_SILENCE = -1.5
"""Of a spectrogram without any sound."""


class SoundModality(Modality):
    """The encoder of a Whisper from a local ``transformers`` folder.

    A sound is cut into windows of ``window_s`` seconds, the last filled up with silence, whose states are dropped.
    ``merge`` states become a token. Position embeddings are the first of the network's, which was made for 30 seconds.
    Source of the spectrogram: A. Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022.
    """

    needs_weights = True
    model_types = ("whisper",)
    upload_suffixes = (".wav",)

    def __init__(  # noqa: PLR0913 -- each is a key of a YAML file
        self,
        width: int,
        weights: str | None = None,
        *,
        window_s: float = 3.0,
        most_s: float = 30.0,
        merge: int = 5,
        connector: Literal["linear", "mlp"] = "mlp",
        frozen: bool = True,
        connector_frozen: bool = False,
    ) -> None:
        """``most_s``: what is longer is cut off. Raises HpcmmError if the folder ``weights`` is no Whisper, and for
        lengths that no sound has."""
        super().__init__()
        for name, length_s in {"window_s": window_s, "most_s": most_s}.items():
            if not 0 < length_s <= LONGEST_S:
                raise HpcmmError(f"{name} of the sound is {length_s}, but must be above 0 and at most {LONGEST_S} s.")
        states = round(window_s * RATE_HZ / HOP / FRAMES_PER_STATE)
        if merge < 1 or states < 1 or states % merge:
            raise HpcmmError(
                f"A window of {window_s} s has {states} states of 20 ms, but must have a multiple of merge={merge}: "
                "change window_s or merge of the sound."
            )
        encoder = _shortened(self.network(weights, states), states)
        self._merge, self._states = merge, states
        self.most_s = most_s
        self._bands = int(encoder.config.num_mel_bins)
        joined = Connector(connector, int(encoder.config.d_model) * merge, width)
        self.finish(encoder, joined, frozen=frozen, connector_frozen=connector_frozen)
        encoder.embed_positions.requires_grad_(False)  # sines, which never train

    def network(self, weights: str | None, states: int) -> Any:
        """A ``WhisperEncoder`` for windows of at least ``states`` states."""
        del states
        if weights is None:
            raise HpcmmError("A sound encoder needs the folder of its weights: give it as weights, or take a tiny one.")
        from transformers import WhisperModel  # noqa: PLC0415 - takes seconds

        folder = Path(weights).expanduser()
        kind = model_type_of(folder, "a sound encoder", "weights")
        if kind not in self.model_types:
            raise HpcmmError(f"{folder} holds a model of type {kind}, but sounds take {', '.join(self.model_types)}.")
        return load_pretrained(WhisperModel, folder, "a sound encoder", "weights").encoder

    def read(self, path: Path) -> Tensor:
        """A WAV file to its log-mel spectrogram (bands, frames), float32."""
        return self.prepare(read_sound(path, RATE_HZ))

    def prepare(self, samples: NDArray[np.float32]) -> Tensor:
        """As :meth:`read`, of samples (n,) in memory, from -1 to 1, at RATE_HZ."""
        wave = samples[: int(self.most_s * RATE_HZ)]
        whole = HOP * FRAMES_PER_STATE * self._merge  # samples of a token
        wave = np.pad(wave, (0, max(whole, -(-len(wave) // whole) * whole) - len(wave)))
        features = _spectrogram(self._bands)(
            wave, sampling_rate=RATE_HZ, padding="do_not_pad", truncation=False, return_tensors="np"
        )["input_features"]
        return torch.from_numpy(np.ascontiguousarray(features[0], dtype=np.float32))

    def count(self, prepared: Tensor) -> int:
        return int(prepared.shape[-1]) // (FRAMES_PER_STATE * self._merge)

    def example(self) -> Tensor:
        return torch.full((self._bands, FRAMES_PER_STATE * self._merge), _SILENCE)

    def forward(self, prepared: Sequence[Tensor]) -> Tensor:
        frames = self._states * FRAMES_PER_STATE
        windows: list[Tensor] = []
        kept: list[int] = []
        for sound in prepared:
            silence = (sound.max() - _QUIETEST).clamp(min=_SILENCE)
            filled = torch.cat([sound, silence.expand(len(sound), -sound.shape[1] % frames)], dim=1)
            windows += torch.split(filled, frames, dim=1)
            length = sound.shape[1] // FRAMES_PER_STATE
            kept += [min(self._states, length - start) for start in range(0, length, self._states)]
        features = torch.stack(windows).to(next(self.encoder.parameters()).dtype)
        states = self.encoder(features).last_hidden_state
        own = torch.cat([window[:length] for window, length in zip(states, kept, strict=True)])
        tokens: Tensor = self.connector(merged_runs(own, self._merge))
        return tokens


class TinySoundModality(SoundModality):
    """A small random encoder of Whisper's classes, for machines without weights."""

    needs_weights = False

    def __init__(  # noqa: PLR0913 -- each is a key of a YAML file
        self,
        width: int,
        *,
        channels: int = 64,
        layers: int = 2,
        heads: int = 4,
        bands: int = 40,
        window_s: float = 3.0,
        most_s: float = 30.0,
        merge: int = 5,
        connector: Literal["linear", "mlp"] = "mlp",
        frozen: bool = False,
        connector_frozen: bool = False,
    ) -> None:
        self._sizes = {
            "d_model": channels,
            "encoder_ffn_dim": 2 * channels,
            "encoder_layers": layers,
            "encoder_attention_heads": heads,
            "num_mel_bins": bands,
            # With the default, 0.02, a sound is a hundredth of the position embeddings that are added to it.
            "init_std": channels**-0.5,
        }
        super().__init__(
            width,
            window_s=window_s,
            most_s=most_s,
            merge=merge,
            connector=connector,
            frozen=frozen,
            connector_frozen=connector_frozen,
        )

    def network(self, weights: str | None, states: int) -> Any:
        del weights
        from transformers import WhisperConfig  # noqa: PLC0415 - takes seconds
        from transformers.models.whisper.modeling_whisper import WhisperEncoder  # noqa: PLC0415

        return WhisperEncoder(WhisperConfig(**self._sizes, max_source_positions=states))


def _shortened(encoder: Any, states: int) -> Any:
    """``encoder`` for windows of ``states`` states. Raises HpcmmError if it was made for shorter ones."""
    positions: nn.Embedding = encoder.embed_positions
    if positions.num_embeddings < states:
        raise HpcmmError(
            f"The sound encoder takes windows of {positions.num_embeddings * 0.02:g} s at most, not of "
            f"{states * 0.02:g} s: make window_s of the sound smaller."
        )
    if positions.num_embeddings > states:
        encoder.embed_positions = nn.Embedding(
            states, positions.embedding_dim, _weight=positions.weight.detach()[:states].clone()
        )
        encoder.max_source_positions = encoder.config.max_source_positions = states
    return encoder


@functools.cache
def _spectrogram(bands: int) -> Any:
    from transformers import WhisperFeatureExtractor  # noqa: PLC0415 - takes seconds

    return WhisperFeatureExtractor(feature_size=bands, sampling_rate=RATE_HZ, hop_length=HOP)
