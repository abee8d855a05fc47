"""Where a run's language model lies."""

from __future__ import annotations

from dataclasses import replace

from hpcmm.workloads.anomaly.schema import AnomalyConfig, LlmKind, ModelConfig
from hpcmm.workloads.smollm2 import prepare_smollm2, smollm2_folder


def model_config(config: AnomalyConfig) -> ModelConfig:
    """``model`` with the language model's folder filled in if that is one in the cache.

    Raises HpcmmError if it is not there, since only the preparation of a run makes it.
    """
    llm = config.model.llm
    if llm.kind is not LlmKind.smollm2:
        return config.model
    return replace(config.model, llm=replace(llm, path=str(smollm2_folder(config.cluster))))


def ensure_llm(config: AnomalyConfig) -> None:
    """Convert the packaged language model if the configuration asks for it and it is not there."""
    if config.model.llm.kind is LlmKind.smollm2:
        prepare_smollm2(config.cluster)
