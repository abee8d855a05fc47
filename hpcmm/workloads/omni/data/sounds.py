"""WAV files as samples at the rate of an encoder."""

from __future__ import annotations

import io
import os
import struct
import warnings
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcmm.errors import HpcmmError
from hpcmm.files import open_followed, read_followed
from hpcmm.text import visible

LONGEST_S = 1800
"""Of a sound; a longer one would need more memory than a rank has."""
_MOST_BYTES = 1 << 29
_LOUDEST = 2.0**31
"""Of samples, which should lie from -1 to 1; the power of larger ones is no float32 number."""
_RATES_HZ = range(1000, 400_000)
_MOST_CHUNKS = 1000
"""In front of the samples of a WAV file."""


def read_sound(path: Path, rate_hz: int) -> NDArray[np.float32]:
    """The sound as (samples,) from -1 to 1, one channel, the mean of all, resampled to ``rate_hz``.

    WAV files of any whole number of bits up to 32, or of floating point numbers. Raises HpcmmError if the file cannot
    be read, is empty, or is longer than half an hour.
    """
    found_hz, values = _read(path)
    samples = _scaled(values)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not len(samples):
        raise HpcmmError(f"The sound {visible(str(path))} is empty; replace it or take it out of the set.")
    if not np.isfinite(samples).all():
        raise HpcmmError(f"The sound {visible(str(path))} has values that are not finite numbers; replace it.")
    if np.abs(samples).max() > _LOUDEST:
        raise HpcmmError(f"The sound {visible(str(path))} has values far beyond -1 to 1; replace it.")
    if found_hz not in _RATES_HZ or len(samples) > LONGEST_S * found_hz:
        raise HpcmmError(
            f"The sound {visible(str(path))} has {len(samples)} samples at {found_hz} Hz: it may have at most "
            f"{LONGEST_S} s, at {_RATES_HZ[0]} to {_RATES_HZ[-1]} Hz."
        )
    return resample(samples, found_hz, rate_hz)


@dataclass(frozen=True, slots=True)
class SoundHeader:
    """What a WAV file says of its samples."""

    rate_hz: int
    frames: int
    """Samples of each channel."""

    @property
    def seconds(self) -> float:
        return self.frames / self.rate_hz


def sound_header(path: Path) -> SoundHeader:
    """The header of a WAV file, without a sample being read.

    Raises HpcmmError, with a sentence for whoever uploaded it, if it is no such file or does not hold what it says.
    """
    with open_followed(path) as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            raise HpcmmError("The file is no WAV sound: convert it to WAV.")
        frame_bytes = rate_hz = 0
        for _ in range(_MOST_CHUNKS):
            name, size = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
            start = file.tell()
            if name == b"fmt ":
                _, _, rate_hz, _, frame_bytes = struct.unpack("<HHIIH", file.read(14).ljust(14, b"\0"))
            if name == b"data" or not name.strip(b"\0"):
                break
            file.seek(start + size + size % 2)
        if name != b"data" or frame_bytes == 0 or rate_hz not in _RATES_HZ:
            raise HpcmmError(
                f"The sound is damaged, or not of {_RATES_HZ[0]} to {_RATES_HZ[-1]} samples a second: save it anew."
            )
        if start + size > os.fstat(file.fileno()).st_size:
            raise HpcmmError("The sound is cut off: its file has fewer samples than it says.")
    if size < frame_bytes:
        raise HpcmmError("The sound is empty.")
    return SoundHeader(rate_hz, size // frame_bytes)


def resample(samples: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """(samples,) at another rate, by a polyphase filter that lets no higher frequency fold back."""
    if from_hz == to_hz:
        return samples
    from scipy.signal import resample_poly  # noqa: PLC0415 -- takes most of a second

    common = gcd(from_hz, to_hz)
    return np.asarray(resample_poly(samples, to_hz // common, from_hz // common), np.float32)


def write_sound(path: Path, samples: NDArray[np.float32], rate_hz: int) -> None:
    """(samples,) from -1 to 1 as a WAV file of 16 bits."""
    from scipy.io import wavfile  # noqa: PLC0415 -- as above

    wavfile.write(path, rate_hz, np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16))


def _read(path: Path) -> tuple[int, NDArray[Any]]:
    from scipy.io import wavfile  # noqa: PLC0415 -- as above

    named = f"The sound {visible(str(path))}"
    try:
        content = read_followed(path, _MOST_BYTES + 1)
    except OSError as error:
        raise HpcmmError(f"{named} cannot be read: {error.strerror}.") from error
    if len(content) > _MOST_BYTES:
        raise HpcmmError(f"{named} has more than {_MOST_BYTES >> 20} MiB; cut it into shorter ones.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that are no sound
            rate_hz, values = wavfile.read(io.BytesIO(content))
    except Exception as error:  # SciPy raises about anything, depending on where the damage lies
        reason = visible(str(error)).rstrip(".")
        raise HpcmmError(
            f"{named} cannot be read as a WAV file: {reason}; replace it or take it out of the set."
        ) from error
    return int(rate_hz), values


def _scaled(values: NDArray[Any]) -> NDArray[np.float32]:
    """From -1 to 1. Whole numbers of 8 bits have no sign; those of 24 bits SciPy moves up to 32."""
    samples: NDArray[np.float32] = values.astype(np.float32)
    if values.dtype == np.uint8:
        return (samples - 128) / np.float32(128)
    if np.issubdtype(values.dtype, np.integer):
        return samples / np.float32(np.iinfo(values.dtype).max + 1)
    return samples
