"""How ``python -m hpcmm.evaluate`` scores runs of this workload. Torch is imported when a run is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpcmm.config.parts import part_name
from hpcmm.evaluate.evaluation import MEAN, Evaluation, Progress, Scored
from signals.schema import SignalsConfig

if TYPE_CHECKING:
    import torch


class SignalsEvaluation(Evaluation):
    """Accuracy by kind of wave."""

    metrics = ("accuracy",)
    named_by = ("net=",)

    def model_name(self, config: SignalsConfig) -> str:
        return part_name(config.net)

    def build_model(self, config: SignalsConfig) -> torch.nn.Module:
        from signals.training import build_net  # noqa: PLC0415 -- imports torch

        return build_net(config)

    def score(self, model: Any, config: SignalsConfig, device: torch.device, progress: Progress) -> Scored:
        import pandas as pd  # noqa: PLC0415
        import torch  # noqa: PLC0415

        from signals.data import CLASSES  # noqa: PLC0415
        from signals.training import test_batch  # noqa: PLC0415

        signals, labels = test_batch(config)
        with torch.no_grad():
            right = (model(signals.to(device)).argmax(dim=1).cpu() == labels).float()
        progress(len(labels), len(labels))
        rows = [(name, float(right[labels == number].mean())) for number, name in enumerate(CLASSES)]
        mean = sum(value for _, value in rows) / len(rows)
        table = pd.DataFrame([*rows, (MEAN, mean)], columns=["category", "accuracy"])
        return Scored(table, trained_on="made signals", scored_on="made signals")
