"""Where a run's language model lies."""

from __future__ import annotations

from dataclasses import replace

from hpcmm.errors import HpcmmError
from hpcmm.node.cache import cache_dir
from hpcmm.workloads.anomaly.schema import AnomalyConfig, LlmKind, ModelConfig


def model_config(config: AnomalyConfig) -> ModelConfig:
    """``model`` with the language model's folder filled in if that is one in the cache.

    Raises HpcmmError if it is not there, since only the preparation of a run makes it.
    """
    llm = config.model.llm
    if llm.kind is not LlmKind.smollm2:
        return config.model
    from hpcmm.workloads.anomaly.models.smollm2 import FOLDER  # noqa: PLC0415 -- imports torch

    folder = cache_dir(config.cluster) / "llm" / FOLDER
    if not folder.is_dir():
        raise HpcmmError(f"{folder} is not there: every run makes it before its ranks start, unless it is removed.")
    return replace(config.model, llm=replace(llm, path=str(folder)))


def ensure_llm(config: AnomalyConfig) -> None:
    """Convert the packaged language model if the configuration asks for it and it is not there."""
    if config.model.llm.kind is not LlmKind.smollm2:
        return
    from hpcmm.workloads.anomaly.models.smollm2 import FOLDER, ensure_smollm2  # noqa: PLC0415 -- imports torch

    folder = cache_dir(config.cluster) / "llm" / FOLDER
    if not folder.is_dir():
        print(f"Converting the language model's packaged weights in {folder}.", flush=True)
    ensure_smollm2(folder)
