"""The anomaly detector as a workload: what the toolkit asks of it, each part imported only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcmm.config.workload import Workload

if TYPE_CHECKING:
    from hpcmm.evaluate.evaluation import Evaluation
    from hpcmm.serve.served import ServedModel


class AnomalyWorkload(Workload):
    """Images and text to heat maps, scores and words."""

    def evaluation(self) -> Evaluation:
        from hpcmm.workloads.anomaly.evaluation import AnomalyEvaluation  # noqa: PLC0415 -- for this command alone

        return AnomalyEvaluation()

    def served(self) -> ServedModel:
        from hpcmm.workloads.anomaly.page.served import ServedDetector  # noqa: PLC0415 -- for this command alone

        return ServedDetector()
