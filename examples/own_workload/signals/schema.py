"""The keys that this workload adds to a run. No torch: a login node reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpcmm.config.keys import PartGroup, key, made_by
from hpcmm.config.schema import RunConfig

NET = PartGroup("net", "signals.nets.Net", given=("length", "classes"))


@dataclass
class SignalsData:
    """The signals, which are made as they are needed."""

    length: int = key(64, "Samples of a signal.", least=8)
    noise: float = key(0.3, "Standard deviation of the noise; a wave has the amplitude 1.", least=0)
    examples: int = key(2048, "Signals to train on.", least=1)
    test_examples: int = key(300, "Signals to score on.", least=1)


@dataclass
class SignalsConfig(RunConfig):
    """A run of this workload: all of hpcmm's keys, and ``net`` and ``data``."""

    net: Any = key("convolution", "The network: a name in ``conf/net/``.", part=NET)
    data: SignalsData = made_by(SignalsData)
