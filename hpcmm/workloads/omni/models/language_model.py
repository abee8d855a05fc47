"""The causal language model that the configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.workloads.causal_lm import CausalLm, add_lora, load_causal_lm
from hpcmm.workloads.omni.schema import ARCHITECTURES, LanguageModelConfig, LanguageModelKind
from hpcmm.workloads.tiny_lm import Sizes, build_tiny_lm

_PATH = "model.language_model.path"
_TARGETS = "model.language_model.lora_targets"


def build_language_model(config: LanguageModelConfig, tokenizer: Any, attention: str | None) -> CausalLm:
    """Its weights frozen or not, with LoRA where ``lora_rank`` is above 0.

    ``tokenizer``: of a tiny one; None: of bytes. ``attention``: as ``transformers`` names it; None: its default.
    Raises HpcmmError if the folder is no such model, or ``lora_targets`` names no part of it.
    """
    if config.kind is LanguageModelKind.tiny:
        language = build_tiny_lm(
            config.architecture, Sizes(**vars(config.tiny)), tokenizer=tokenizer, attention=attention
        )
    else:
        if config.path is None:
            raise HpcmmError(f"The language model's folder is not given: name it as {_PATH}=/path/to/folder.")
        language = load_causal_lm(Path(config.path).expanduser(), _PATH, ARCHITECTURES, attention)
    language.network.train().requires_grad_(not config.frozen)  # a folder's begins in evaluation mode
    if config.lora_rank > 0:
        add_lora(
            language.network,
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_targets,
            _TARGETS,
        )
    return language
