"""Images and sounds: files to tokens, and the packed encoders against those of transformers."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpcmm.config.parts import build_part
from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.models.modalities.image import ImageModality, TinyImageModality
from hpcmm.workloads.omni.models.modalities.merging import merged_runs, merged_squares
from hpcmm.workloads.omni.models.modalities.sound import SoundModality, TinySoundModality
from hpcmm.workloads.omni.schema import MODALITY

WIDTH = 48
ARCHITECTURES = ("vit", "clip", "siglip")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tone(path: Path, seconds: float, rate_hz: int = 22_050, channels: int = 1) -> Path:
    """A WAV file of 16 bits with a tone of 440 Hz."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    samples = (8000 * np.sin(2 * np.pi * 440 * times)).astype("<i2")
    with wave.open(str(path), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(rate_hz)
        opened.writeframes(np.repeat(samples, channels).tobytes())
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_images_have_the_features_that_the_network_gives_each(architecture: str):
    modality = TinyImageModality(WIDTH, architecture=architecture).eval()
    images = [torch.randn(3, height, width) for height, width in ((64, 64), (32, 48), (64, 64), (16, 96))]
    packed = modality.encoder(images)
    network = modality.encoder.network
    own = []
    network.config._attn_implementation = "sdpa"
    for image in images:
        states = network(image[None], interpolate_pos_encoding=True).last_hidden_state[0]
        own.append(states[int(architecture != "siglip") :])
    torch.testing.assert_close(packed, torch.cat(own), rtol=1e-4, atol=1e-5)


def test_a_larger_image_takes_more_tokens_up_to_a_bound(tmp_path: Path):
    modality = TinyImageModality(WIDTH, most_tokens=30)
    counts = {}
    for size in ((16, 16), (64, 32), (33, 50), (4000, 3000), (5000, 8)):
        Image.new("L", size, 128).save(tmp_path / "image.png")
        prepared = modality.read(tmp_path / "image.png")
        assert prepared.shape[1] % 16 == prepared.shape[2] % 16 == 0
        counts[size] = modality.count(prepared)
        assert modality([prepared, prepared]).shape == (2 * counts[size], WIDTH)
    assert counts[16, 16] == 1
    assert counts[64, 32] == 8
    assert counts[33, 50] == 6
    assert 20 <= counts[4000, 3000] <= 30
    assert counts[5000, 8] == 30


def test_a_file_that_is_no_image_or_sound_is_named(tmp_path: Path):
    path = tmp_path / "broken"
    path.write_bytes(b"RIFF0000WAVE")
    with pytest.raises(HpcmmError, match=r"broken"):
        TinyImageModality(WIDTH).read(path)
    with pytest.raises(HpcmmError, match=r"sound .*broken cannot be read as a WAV file"):
        TinySoundModality(WIDTH).read(path)
    with pytest.raises(HpcmmError, match=r"sound .*missing"):
        TinySoundModality(WIDTH).read(tmp_path / "missing")


@pytest.mark.parametrize(("seconds", "tokens"), [(0.01, 1), (0.1, 1), (0.55, 6), (3.0, 30), (7.2, 72), (50.0, 80)])
def test_a_sound_takes_a_token_each_tenth_of_a_second(tmp_path: Path, seconds: float, tokens: int):
    modality = TinySoundModality(WIDTH, most_s=8.0)
    prepared = modality.read(tone(tmp_path / "tone.wav", seconds))
    assert modality.count(prepared) == tokens
    assert modality([prepared]).shape == (tokens, WIDTH)


def test_a_sound_is_the_same_at_another_rate_and_with_two_channels(tmp_path: Path):
    modality = TinySoundModality(WIDTH)
    one = modality.read(tone(tmp_path / "one.wav", 1.0, rate_hz=16_000))
    for other in ({"rate_hz": 48_000}, {"rate_hz": 16_000, "channels": 2}):
        same = modality.read(tone(tmp_path / "other.wav", 1.0, **other))
        torch.testing.assert_close(same[:, 5:-5], one[:, 5:-5], rtol=0, atol=0.1)


def test_a_sound_alone_gives_what_it_gives_beside_others():
    modality = TinySoundModality(WIDTH, window_s=1.0).eval()
    sounds = [torch.randn(40, frames).clamp(min=-1) for frames in (10, 250, 100)]
    own = torch.cat([modality([sound]) for sound in sounds])
    torch.testing.assert_close(modality(sounds), own, rtol=1e-4, atol=1e-5)


def test_a_window_is_what_whisper_makes_of_as_many_seconds():
    modality = TinySoundModality(WIDTH, window_s=2.0, merge=1).eval()
    sound = torch.randn(40, 200)
    states = modality.encoder(sound[None]).last_hidden_state[0]
    torch.testing.assert_close(modality([sound]), modality.connector(states))


def test_neighbours_are_merged():
    grid = torch.arange(8.0)[:, None]  # rows 0-3 and 4-7
    assert merged_squares(grid, [(2, 4)], 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert merged_squares(grid, [(2, 2), (2, 2)], 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert merged_runs(grid, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_encoder_loads_from_a_folder(tmp_path: Path, architecture: str):
    tiny = TinyImageModality(WIDTH, architecture=architecture).eval()
    tiny.encoder.network.save_pretrained(tmp_path)
    read = ImageModality(WIDTH, str(tmp_path)).eval()
    image = torch.rand(3, 64, 32)
    torch.testing.assert_close(read.encoder([image]), tiny.encoder([image]))
    assert not any(each.requires_grad for each in read.encoder.parameters())
    assert all(each.requires_grad for each in read.connector.parameters())


def test_whispers_encoder_loads_from_a_folder_for_shorter_windows(tmp_path: Path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 16,
    }
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 100}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **decoder, **special, max_source_positions=300, max_target_positions=16)
    ).save_pretrained(tmp_path)
    modality = SoundModality(WIDTH, str(tmp_path), window_s=2.0)
    assert modality.encoder.embed_positions.weight.shape == (100, 32)
    assert modality([torch.randn(16, 100)]).shape == (10, WIDTH)
    with pytest.raises(HpcmmError, match=r"windows of 6 s at most, not of 8 s"):
        SoundModality(WIDTH, str(tmp_path), window_s=8.0)
    with pytest.raises(HpcmmError, match="images take"):
        ImageModality(WIDTH, str(tmp_path))


def test_a_window_that_merging_would_cross_is_refused():
    with pytest.raises(HpcmmError, match=r"150 states of 20 ms, but must have a multiple of merge=7"):
        TinySoundModality(WIDTH, merge=7)


@pytest.mark.parametrize("length_s", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["window_s", "most_s"])
def test_a_length_that_no_sound_has_is_refused(name: str, length_s: float):
    with pytest.raises(HpcmmError, match=f"{name} of the sound is {length_s}, but must be above 0"):
        TinySoundModality(WIDTH, **{name: length_s})


def test_sizes_that_transformers_refuses_are_a_sentence():
    part = {"_target_": f"{TinySoundModality.__module__}.TinySoundModality", "heads": 3}
    with pytest.raises(HpcmmError, match=r"model/modality=.* cannot be made: embed_dim must be divisible by num_heads"):
        build_part(part, MODALITY, width=WIDTH)
    with pytest.raises(HpcmmError, match=r"model/modality=.* cannot be made: integer division"):
        build_part({**part, "heads": 0}, MODALITY, width=WIDTH)


def test_an_unknown_connector_is_refused():
    with pytest.raises(HpcmmError, match="choose linear or mlp"):
        TinyImageModality(WIDTH, connector="cross")
