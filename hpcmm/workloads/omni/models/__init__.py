"""The model and its modalities, with no word of ranks or groups."""

from hpcmm.workloads.omni.models.omni import OmniModel, build_model

__all__ = ["OmniModel", "build_model"]
