"""The held-out images of a run's data: examples for the page, and what the threshold is chosen on."""

from __future__ import annotations

import sys

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.serve.service import Example
from hpcmm.workloads.anomaly.data.anomaly import TestImages, build_datasets
from hpcmm.workloads.anomaly.data_root import data_root

MOST_EXAMPLES = 8


def held_out_images(config: RunConfig) -> TestImages | None:
    """None, and a line that says so, where the data is not at hand: the model can be served without."""
    try:
        return build_datasets(data_root(config), config.data, config.train.seed)[1]
    except (HpcmmError, OSError) as error:
        print(f"hpcmm.serve: no examples and no choice of a threshold: {error}", file=sys.stderr, flush=True)
        return None


def examples_of(test: TestImages | None) -> tuple[list[Example], list[str]]:
    """A few images, first a defect of each category and then normal ones; and the phrases of all categories."""
    if test is None:
        return [], []
    every = [Example(*test.described(index)) for index in range(len(test))]
    firsts = {(example.sample.category, example.sample.label): example for example in reversed(every)}
    chosen = sorted(firsts.values(), key=lambda example: (-example.sample.label, example.sample.category))
    return chosen[:MOST_EXAMPLES], list(dict.fromkeys(example.caption for example in every))
