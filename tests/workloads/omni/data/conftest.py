"""A data folder of a user's, modalities that need no model, and one small data set that is made for all tests here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.conversations import TRAIN
from hpcmm.workloads.omni.data.images import read_image
from hpcmm.workloads.omni.data.made.folder import make_folder
from hpcmm.workloads.omni.data.sounds import read_sound
from hpcmm.workloads.omni.data.tokenizer import make_tokenizer
from hpcmm.workloads.omni.schema import OmniDataConfig


class Pictures:
    """A token for each 16 x 16 pixels."""

    def read(self, path: Path) -> NDArray[np.uint8]:
        return read_image(path)

    def count(self, prepared: NDArray[np.uint8]) -> int:
        return -(-prepared.shape[0] // 16) * -(-prepared.shape[1] // 16)


class Sounds:
    """A token for each tenth of a second."""

    def read(self, path: Path) -> NDArray[np.float32]:
        return read_sound(path, 8000)

    def count(self, prepared: NDArray[np.float32]) -> int:
        return -(-len(prepared) // 800)


class Frames:
    """A modality that hpcmm does not know: a folder of pictures."""

    def read(self, path: Path) -> list[NDArray[np.uint8]]:
        frames = [read_image(each) for each in sorted(path.glob("*.png"))]
        if not frames:
            raise HpcmmError(f"{path} has no frames.")
        return frames

    def count(self, prepared: list[NDArray[np.uint8]]) -> int:
        return 2 * len(prepared)


@pytest.fixture
def modalities() -> dict[str, Any]:
    return {"image": Pictures(), "sound": Sounds()}


@pytest.fixture
def frames() -> Frames:
    return Frames()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer(["What is this? A red brick and a blue cup, and many other words."] * 3, 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with two pictures, and no conversations yet."""
    root = tmp_path / "it's a data folder"
    root.mkdir()
    Image.new("RGB", (32, 16), "red").save(root / "red.png")
    Image.new("RGB", (16, 16), "blue").save(root / "blue.png")
    return root


Write = Callable[..., Path]


@pytest.fixture
def write(folder: Path) -> Write:
    """Writes conversations, or lines as they are, into a file of the data folder."""

    def to_file(*lines: Any, name: str = TRAIN) -> Path:
        text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return to_file


@pytest.fixture(scope="session")
def small() -> OmniDataConfig:
    return OmniDataConfig(train_examples=60, test_examples=40)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, small: OmniDataConfig) -> Path:
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    root = tmp_path_factory.mktemp("it's a cache") / "made here"
    make_folder(root, small, seed=0)
    return root
