"""Files of sounds and pictures as arrays."""

import struct
import wave

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.images import read_image
from hpcmm.workloads.omni.data.sounds import read_sound, resample, write_sound

RATE_HZ = 8000


def tone(frequency_hz, rate_hz=RATE_HZ, seconds=0.5):
    return np.sin(2 * np.pi * frequency_hz * np.arange(int(rate_hz * seconds)) / rate_hz).astype(np.float32)


def loudest_hz(samples, rate_hz):
    return np.argmax(np.abs(np.fft.rfft(samples))) * rate_hz / len(samples)


def test_a_sound_comes_back_as_it_was_written(tmp_path):
    samples = tone(440) * 0.5
    write_sound(tmp_path / "a.wav", samples, RATE_HZ)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getsampwidth(), file.getnchannels(), file.getframerate()) == (2, 1, RATE_HZ)
    read = read_sound(tmp_path / "a.wav", RATE_HZ)
    assert read.dtype == np.float32
    assert np.abs(read - samples).max() < 1e-4


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_samples_of_any_kind_lie_between_minus_one_and_one(tmp_path, kind):
    values = tone(440) * 0.5
    if kind is np.uint8:
        stored = np.round(values * 127 + 128).astype(kind)
    elif np.issubdtype(kind, np.integer):
        stored = np.round(values * np.iinfo(kind).max).astype(kind)
    else:
        stored = values.astype(kind)
    wavfile.write(tmp_path / "a.wav", RATE_HZ, stored)
    assert np.abs(read_sound(tmp_path / "a.wav", RATE_HZ) - values).max() < 0.01


def test_several_channels_become_their_mean(tmp_path):
    wavfile.write(tmp_path / "a.wav", RATE_HZ, np.stack([tone(440), -tone(440)], 1))
    assert np.abs(read_sound(tmp_path / "a.wav", RATE_HZ)).max() < 1e-6


@pytest.mark.parametrize("found_hz", [4000, 16_000, 22_050, 44_100])
def test_a_sound_is_resampled_to_the_rate_of_the_encoder(tmp_path, found_hz):
    write_sound(tmp_path / "a.wav", tone(440, found_hz), found_hz)
    read = read_sound(tmp_path / "a.wav", RATE_HZ)
    assert len(read) == RATE_HZ // 2
    assert abs(loudest_hz(read, RATE_HZ) - 440) < 4


def test_what_a_lower_rate_cannot_hold_does_not_fold_back():
    assert np.abs(resample(tone(7000, 16_000), 16_000, RATE_HZ)[50:-50]).max() < 0.01


def with_rate(path, rate_hz):
    content = bytearray(path.read_bytes())
    content[24:32] = struct.pack("<II", rate_hz, 2 * rate_hz)
    path.write_bytes(content)


def test_whatever_is_damaged_in_a_sound_becomes_a_sentence(tmp_path):
    write_sound(tmp_path / "a.wav", tone(440), RATE_HZ)
    sound, draw = (tmp_path / "a.wav").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(sound)
        for place in draw.integers(0, 48, 3):
            content[place] = draw.choice([0, 1, 127, 128, 255, draw.integers(256)])
        (tmp_path / "a.wav").write_bytes(content[: draw.integers(20, len(content))])
        try:
            read_sound(tmp_path / "a.wav", RATE_HZ)
        except HpcmmError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"no sound"), "cannot be read as a WAV file"),
        (lambda path: path.write_bytes(path.read_bytes()[:30]), "cannot be read as a WAV file"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: write_sound(path, tone(440)[:0], RATE_HZ), "is empty"),
        (lambda path: wavfile.write(path, RATE_HZ, np.full(9, np.nan, np.float32)), "not finite numbers"),
        (lambda path: wavfile.write(path, RATE_HZ, np.full(9, 1e38, np.float32)), "far beyond -1 to 1"),
        (lambda path: with_rate(path, 0), "at 0 Hz: it may have at most 1800 s"),
        (lambda path: with_rate(path, 1), "has 4000 samples at 1 Hz"),
        (lambda path: with_rate(path, 500_000), "at 500000 Hz: it may have at most"),
    ],
)
def test_a_sound_that_cannot_be_used_is_named_with_the_reason(tmp_path, spoil, said):
    path = tmp_path / "a.wav"
    write_sound(path, tone(440), RATE_HZ)
    spoil(path)
    with pytest.raises(HpcmmError) as caught:
        read_sound(path, RATE_HZ)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_sound_longer_than_half_an_hour_is_refused_before_it_is_resampled(tmp_path):
    wavfile.write(tmp_path / "a.wav", 1000, np.zeros(1_801_000, np.uint8))
    with pytest.raises(HpcmmError, match="it may have at most 1800 s"):
        read_sound(tmp_path / "a.wav", 400_000)


def test_pictures_keep_their_size_and_have_three_channels(tmp_path):
    for mode, shape in (("RGB", (5, 9, 3)), ("L", (5, 9, 3)), ("RGBA", (5, 9, 3)), ("I;16", (5, 9, 3))):
        path = tmp_path / f"{mode[0]}.png"
        Image.new(mode, (9, 5), 0x80FF if mode == "I;16" else None).save(path)
        pixels = read_image(path)
        assert (pixels.shape, pixels.dtype) == (shape, np.uint8)
    assert set(read_image(tmp_path / "I.png").ravel().tolist()) == {0x80}


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(HpcmmError, match=r"large\.png cannot be read"):
        read_image(tmp_path / "large.png")
