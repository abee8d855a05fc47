"""Where a run's images lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hpcmm.errors import HpcmmError, InputError
from hpcmm.node.cache import data_dir
from hpcmm.workloads.anomaly.data.bad_samples import BadSamples
from hpcmm.workloads.anomaly.data.layouts import READERS
from hpcmm.workloads.anomaly.data.standins import default_root, generate
from hpcmm.workloads.anomaly.schema import AnomalyConfig, DataConfig


def data_root(config: AnomalyConfig) -> Path:
    """The images to train on: ``data.root``, or the stand-ins' folder in the cache."""
    return _folder(config, config.data)


def data_config(config: AnomalyConfig) -> DataConfig:
    """``data`` with ``test_root`` filled in where the run is scored on other stand-ins."""
    data = config.data
    if data.root is not None or data.test_root is not None or data.test_standins is None:
        return data
    test = _test_standins(data)
    return replace(data, test_root=str(_folder(config, test)), test_layout=test.layout)


def ensure_data(config: AnomalyConfig) -> None:
    """Make the stand-ins that the run needs and that are not there, and say what it trains on and is scored on.

    Raises InputError if the images are not in the layout that ``config.data`` says.
    """
    if config.data.generate:
        for standins in _standins(config.data):
            root = _folder(config, standins)
            if not root.exists():
                print(f"Making the stand-in images in {root}.", flush=True)
            generate(root, standins, config.train.seed)
    try:
        lines = [*_contents(data_root(config), data_config(config))]
    except HpcmmError as error:
        raise InputError(str(error)) from error
    print("\n".join(lines), flush=True)


def _standins(data: DataConfig) -> Iterator[DataConfig]:
    """The settings of each set of stand-ins that a run with ``data`` needs."""
    if data.root is None:
        yield data
        if data.test_root is None and data.test_standins is not None:
            yield _test_standins(data)


def _test_standins(data: DataConfig) -> DataConfig:
    assert data.test_standins is not None
    return replace(data, standins=data.test_standins, layout=data.test_layout or data.layout)


def _folder(config: AnomalyConfig, data: DataConfig) -> Path:
    if data.root is not None:
        return Path(data.root).expanduser()
    return default_root(data, config.train.seed, data_dir(config.cluster))


def _contents(root: Path, data: DataConfig) -> Iterator[str]:
    bad_samples = BadSamples(data.on_error, "left out")
    reader = READERS[data.layout]
    categories = reader.categories(root, data.categories)
    train = sum(len(reader.train(root, category, bad_samples)) for category in categories)
    yield f"To train on: {train} normal images of {len(categories)} categories in {root}."
    if data.test_root is not None:
        root, reader = Path(data.test_root).expanduser(), READERS[data.test_layout or data.layout]
        categories = reader.categories(root, data.test_categories)
    labels = Counter(sample.label for category in categories for sample in reader.test(root, category, bad_samples))
    yield (
        f"To be scored on: {labels[0]} normal and {labels[1]} damaged images of {len(categories)} categories in {root}."
    )
