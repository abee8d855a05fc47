"""The anomaly detector as a workload: what the toolkit asks of it, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hpcmm.config.workload import Workload
from hpcmm.workloads.anomaly.schema import AnomalyConfig, LlmKind, problems
from hpcmm.workloads.made_data import notes_on_other_seed

if TYPE_CHECKING:
    from hpcmm.evaluate.evaluation import Evaluation
    from hpcmm.serve.served import ServedModel
    from hpcmm.workloads.anomaly.training import AnomalyTraining


class AnomalyWorkload(Workload):
    """Multimodal anomaly detection, spread over the ranks of a job."""

    schema = AnomalyConfig

    def problems(self, config: AnomalyConfig) -> Iterator[str]:
        """What must hold between the keys of ``model``, ``data`` and ``train``."""
        return problems(config)

    def given_paths(self, config: AnomalyConfig) -> Mapping[str, str | None]:
        """Data sets and weights. ``model.llm.path`` counts only if the language model comes from a folder."""
        model, data = config.model, config.data
        return {
            "data.root": data.root,
            "data.test_root": data.test_root,
            "model.image_weights": model.image_weights,
            "model.text_encoder": model.text_encoder,
            "model.llm.path": model.llm.path if model.llm.kind is LlmKind.folder else None,
        }

    def notes_on_start(self, config: AnomalyConfig, before: Mapping[str, Any]) -> Iterator[str]:
        """Whether the run to start from had other stand-in images, for the seed makes them."""
        return notes_on_other_seed(config.data.root, config.train.seed, before, "stand-in images")

    def prepare(self, config: AnomalyConfig) -> None:
        """Make the stand-in images and convert the packaged language model, as far as the run needs them."""
        from hpcmm.workloads.anomaly.data_root import ensure_data  # noqa: PLC0415 -- numpy and pillow, on the node only
        from hpcmm.workloads.anomaly.llm_folder import ensure_llm  # noqa: PLC0415

        ensure_data(config)
        ensure_llm(config)

    def training_class(self) -> type[AnomalyTraining]:
        """The detector on a rank."""
        from hpcmm.workloads.anomaly.training import AnomalyTraining  # noqa: PLC0415 -- imports torch

        return AnomalyTraining

    def evaluation(self) -> Evaluation:
        from hpcmm.workloads.anomaly.evaluation import AnomalyEvaluation  # noqa: PLC0415 -- for this command alone

        return AnomalyEvaluation()

    def served(self) -> ServedModel:
        from hpcmm.workloads.anomaly.page.served import ServedDetector  # noqa: PLC0415 -- for this command alone

        return ServedDetector()
