"""Models, their losses and their scores, with no word of ranks or groups."""

from hpcmm.workloads.anomaly.models.anomaly import AnomalyModel, build_model

__all__ = ["AnomalyModel", "build_model"]
