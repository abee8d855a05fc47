"""Words that espeak-ng speaks: in several voices, speeds and pitches, with a background of noise."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.sounds import read_sound

RATE_HZ = 16_000

TAKES = 24
"""How many times each word is spoken for the training part."""
HELD_OUT_TAKES = 12

_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
_VOICES = ("m1", "m3", "m5", "m6", "f1", "f3", "f4")
_HELD_OUT_VOICES = ("m2", "m4", "m7", "f2", "f5")
_PROGRAM = "espeak-ng"
_LONGEST_CALL_S = 300  # a call takes 10 ms, but a machine without free memory stands still for minutes
_SILENCE = 0.02
"""What is quieter than this share of a word's loudest sample, before and after it, is cut off."""


@dataclass(frozen=True, slots=True)
class Take:
    """A word as it is spoken once. Takes of the held-out part have voices that no other take has."""

    word: str
    number: int
    held_out: bool

    def arguments(self, seed: int) -> list[str]:
        """How espeak-ng speaks it."""
        rng = np.random.default_rng([seed, zlib.crc32(self.word.encode()), self.number, self.held_out])
        accent, voice = rng.choice(_ACCENTS), rng.choice(_HELD_OUT_VOICES if self.held_out else _VOICES)
        words_a_minute, pitch = rng.integers(115, 200), rng.integers(20, 80)
        return ["-z", "-v", f"{accent}+{voice}", "-s", str(words_a_minute), "-p", str(pitch), self.word]


def find_program() -> str:
    """The path of espeak-ng. Raises HpcmmError if it is not installed."""
    program = shutil.which(_PROGRAM)
    if program is None:
        raise HpcmmError(
            f"The sounds of the data set are spoken by {_PROGRAM}, which is not installed: install Debian's package "
            f"(apt-get install {_PROGRAM}), or name a data set of your own with data.root."
        )
    return program


def program_version(program: str) -> str:
    """What espeak-ng says of itself."""
    said = _run([program, "--version"])
    return said.partition("  Data at")[0].strip()


def speak(takes: Collection[Take], seed: int, folder: Path) -> Mapping[Take, NDArray[np.float32]]:
    """Each take as (samples,) from -1 to 1 at :data:`RATE_HZ`, without the silence around it.

    ``folder``, which is there, holds files meanwhile. Raises HpcmmError if espeak-ng is missing or fails.
    """
    program = find_program()

    def record(numbered: tuple[int, Take]) -> NDArray[np.float32]:
        number, take = numbered
        path = folder / f"take-{number}.wav"
        _run([program, "-w", str(path), *take.arguments(seed)])
        try:
            return _trimmed(read_sound(path, RATE_HZ))
        finally:
            path.unlink(missing_ok=True)

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(takes, pool.map(record, enumerate(takes)), strict=True))


def recording(words: list[NDArray[np.float32]], rng: np.random.Generator) -> NDArray[np.float32]:
    """The words one after the other as (samples,), with pauses around them, some noise, and a loudness of its own."""
    pieces = [_pause(0.05, 0.25, rng)]
    for word in words:
        pieces += [word, _pause(0.12, 0.3, rng)]
    samples = np.concatenate(pieces)
    samples = samples / np.abs(samples).max() * rng.uniform(0.3, 0.9)
    noise = rng.normal(0, 1, len(samples)) * samples.std() * rng.uniform(0.01, 0.1)
    return np.asarray(samples + noise, np.float32)


def _pause(least_s: float, most_s: float, rng: np.random.Generator) -> NDArray[np.float32]:
    return np.zeros(int(rng.uniform(least_s, most_s) * RATE_HZ), np.float32)


def _trimmed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    loud = np.flatnonzero(np.abs(samples) > _SILENCE * np.abs(samples).max())
    if not len(loud):
        raise HpcmmError(f"{_PROGRAM} spoke a word without a sound; install its package espeak-ng-data anew.")
    return samples[loud[0] : loud[-1] + 1]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LONGEST_CALL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HpcmmError(f"{command[0]} cannot be run: {error}.") from error
    if done.returncode:
        raise HpcmmError(f"{command[0]} failed with exit status {done.returncode}: {done.stderr.strip()[:200]}.")
    return done.stdout
