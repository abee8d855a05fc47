"""The half of the workload without torch: what login node and batch script ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcmm.config.workload import Workload
from signals.schema import SignalsConfig

if TYPE_CHECKING:
    from signals.evaluation import SignalsEvaluation
    from signals.training import SignalsTraining


class SignalsWorkload(Workload):
    """Which of three waves a noisy signal is."""

    schema = SignalsConfig

    def problems(self, config: SignalsConfig) -> Iterator[str]:
        """Said before anything is submitted."""
        if config.data.examples < config.global_batch_size:
            yield (
                f"data.examples is {config.data.examples}, less than one step's {config.global_batch_size}: raise it, "
                "or lower train.micro_batch_size."
            )

    def training_class(self) -> type[SignalsTraining]:
        """The half with torch."""
        from signals.training import SignalsTraining  # noqa: PLC0415 -- imports torch

        return SignalsTraining

    def evaluation(self) -> SignalsEvaluation:
        """How ``hpcmm.evaluate`` scores a run."""
        from signals.evaluation import SignalsEvaluation  # noqa: PLC0415

        return SignalsEvaluation()
