"""The language model: a LLaMA from a local folder, frozen or not, with low-rank updates that train."""

from __future__ import annotations

from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.schema import LlmConfig, LlmKind
from hpcmm.workloads.causal_lm import CausalLm, add_lora, load_causal_lm


def build_llm(config: LlmConfig) -> CausalLm:
    """The language model that ``config`` names, its weights frozen or not, with LoRA where ``lora_rank`` is above 0.

    Raises HpcmmError if the folder is no such model, or ``lora_targets`` names no part of it.
    """
    if config.kind is LlmKind.tiny:
        from hpcmm.workloads.tiny_lm import build_tiny_lm  # noqa: PLC0415 - for tests alone

        llm = build_tiny_lm()
    else:
        llm = load_causal_lm(_folder(config), "model.llm.path", ("llama",))
    llm.network.requires_grad_(not config.frozen)
    if config.lora_rank > 0:
        add_lora(
            llm.network,
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_targets,
            "model.llm.lora_targets",
        )
    return llm


def _folder(config: LlmConfig) -> Path:
    if config.path is None:
        raise HpcmmError(
            f"model.llm.kind={config.kind} needs the model's folder: give it as model.llm.path=/path/to/folder."
        )
    return Path(config.path).expanduser()
