"""The language model: a LLaMA from a local folder, frozen or not, with low-rank updates that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.schema import LlmConfig, LlmKind


@dataclass(frozen=True, slots=True)
class Llm:
    """A causal language model of ``transformers`` and its tokenizer."""

    network: Any
    """A LlamaForCausalLM, an ``nn.Module``."""
    tokenizer: Any

    @property
    def width(self) -> int:
        """Length of a token's embedding."""
        return int(self.network.config.hidden_size)


def build_llm(config: LlmConfig) -> Llm:
    """The language model that ``config`` names, its weights frozen or not, with LoRA where ``lora_rank`` is above 0.

    Raises HpcmmError if the folder is no such model, or ``lora_targets`` names no part of it.
    """
    if config.kind is LlmKind.tiny:
        from hpcmm.workloads.anomaly.models.tiny_llm import build_tiny_llm  # noqa: PLC0415 - for tests alone

        llm = build_tiny_llm()
    else:
        llm = _load(_folder(config))
    llm.network.requires_grad_(not config.frozen)
    if config.lora_rank > 0:
        _add_lora(llm.network, config)
    return llm


def _folder(config: LlmConfig) -> Path:
    if config.path is None:
        raise HpcmmError(
            f"model.llm.kind={config.kind} needs the model's folder: give it as model.llm.path=/path/to/folder."
        )
    return Path(config.path).expanduser()


def _load(folder: Path) -> Llm:
    """Read tensors and tokenizer; neither pickles nor code of the folder's own."""
    if not (folder / "config.json").is_file():
        raise HpcmmError(f"{folder} has no config.json: set model.llm.path to the folder of a transformers model.")
    if not any(folder.glob("*.safetensors")):
        raise HpcmmError(f"{folder} has no weights in .safetensors files: convert them, for no other kind is read.")
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM  # noqa: PLC0415 - takes seconds

    try:
        with quiet():
            found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if found.model_type != "llama":
                raise HpcmmError(f"{folder} holds a model of type {found.model_type}; only LLaMA's architecture fits.")
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            network, report = LlamaForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise HpcmmError(f"The language model in {folder} cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise HpcmmError(f"The weights in {folder} lack {lacking[0]}, and {len(lacking) - 1} more tensors.")
    return Llm(network, tokenizer)


def _add_lora(network: nn.Module, config: LlmConfig) -> None:
    """Put low-rank updates beside the maps of ``lora_targets``; they start at zero effect, and they alone train.

    Source: E. Hu et al., "LoRA", ICLR 2022.
    """
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - takes seconds

    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
    )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        inject_adapter_in_model(adapter, network)
    except ValueError as error:
        raise HpcmmError(f"model.llm.lora_targets={config.lora_targets} does not fit: {_first_line(error)}") from error
    for parameter in trained:  # peft freezes what it leaves as it is
        parameter.requires_grad_(True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of ``transformers``: one a rank would fill the logs."""
    from transformers.utils import logging  # noqa: PLC0415

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
