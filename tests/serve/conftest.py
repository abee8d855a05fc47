"""A small run to serve, its server, and images to upload."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import serving
from PIL import Image

from hpcmm.serve.options import ServeOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "page"))  # the browser


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a real checkpoint."""
    return serving.train(tmp_path_factory.mktemp("serve") / "runs")


@pytest.fixture(scope="session")
def server(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """A server of it that several tests share, with limits that are quick to reach."""
    limits = ("--max-upload-mb", "1", "--max-megapixels", "4", "--max-files", "5")
    with serving.served(trained_run, tmp_path_factory.mktemp("server"), *limits) as started:
        yield started


@pytest.fixture
def options() -> ServeOptions:
    return ServeOptions(run="/runs/small", max_upload_mb=2, max_megapixels=4)


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Writes an image of noise, as a file of any name and format."""

    def write(name: str = "image.png", mode: str = "RGB", size: tuple[int, int] = (64, 48), **save: object) -> Path:
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = tmp_path / name
        Image.fromarray(noise).convert(mode).save(path, **save)
        return path

    return write
