"""Causal language models of ``transformers`` for any workload: from a local folder, frozen or not, with LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcmm.errors import HpcmmError
from hpcmm.workloads.pretrained import check_no_adapter, check_report, first_line, load_tokenizer, quiet


@dataclass(frozen=True, slots=True)
class CausalLm:
    """A causal language model of ``transformers`` and its tokenizer."""

    network: Any
    """A ``...ForCausalLM``, an ``nn.Module``."""
    tokenizer: Any

    @property
    def width(self) -> int:
        """Length of a token's embedding."""
        return int(self.network.config.hidden_size)


def load_causal_lm(folder: Path, key: str, kinds: Collection[str], attention: str | None = None) -> CausalLm:
    """Read tensors and tokenizer; neither pickles nor code of the folder's own.

    ``key``: the configuration key that names the folder. ``kinds``: the ``model_type`` values that fit. ``attention``:
    the network's attention as ``transformers`` names it; None: its default.
    Raises HpcmmError if the folder is no such model.
    """
    if not (folder / "config.json").is_file():
        raise HpcmmError(f"{folder} has no config.json: set {key} to the folder of a transformers model.")
    if not any(folder.glob("*.safetensors")):
        raise HpcmmError(f"{folder} has no weights in .safetensors files: convert them, for no other kind is read.")
    check_no_adapter(folder, key)
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig  # noqa: PLC0415 - takes seconds

    try:
        with quiet():
            _check_settings(PretrainedConfig.get_config_dict(folder, local_files_only=True)[0], folder, key, kinds)
            found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if attention is not None:  # whatever the folder was saved with
                found._attn_implementation = attention
            tokenizer = load_tokenizer(folder, "the language model", key)
            network, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=found,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except HpcmmError:
        raise
    except Exception as error:  # damaged files show as errors of many libraries
        raise HpcmmError(f"The language model in {folder} cannot be loaded: {first_line(error)}.") from error
    check_report(report, folder, "the language model")
    return CausalLm(network, tokenizer)


def _check_settings(settings: Mapping[str, Any], folder: Path, key: str, kinds: Collection[str]) -> None:
    """Raises HpcmmError if a ``config.json`` is of a model that does not fit."""
    kind = settings.get("model_type")
    if kind not in kinds:
        raise HpcmmError(f"{folder} holds a model of type {kind}, but {key} takes {', '.join(sorted(kinds))}.")
    if settings.get("quantization_config"):
        raise HpcmmError(
            f"{folder} holds quantised weights, which cannot train: name a folder with those of 16 or 32 bits as {key}."
        )


def add_lora(network: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str], key: str) -> None:
    """Put low-rank updates beside the maps named ``targets``; they start at zero effect.

    What trained before still trains. ``key``: the configuration key of ``targets``, for the message.
    Raises HpcmmError if ``targets`` names no part of the network, or one that is no map.
    Source: E. Hu et al., "LoRA", ICLR 2022.
    """
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - takes seconds

    if lacking := _targets_of_nothing(network, targets):  # peft passes over one if another names something
        raise HpcmmError(
            f"{key}={list(targets)} does not fit: nothing is called {lacking[0]}; name maps of {_maps(network)}."
        )
    adapter = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        inject_adapter_in_model(adapter, network)
    except ValueError as error:
        # In more lines it begins with the whole part.
        reason = str(error).rstrip(".") if "\n" not in str(error) else "it has a part that gets no update"
        raise HpcmmError(f"{key}={list(targets)} does not fit: {reason}; name maps of {_maps(network)}.") from error
    for parameter in trained:  # peft freezes what it leaves as it is
        parameter.requires_grad_(True)


def _targets_of_nothing(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Those that name no part; none of a network with fused experts, whose maps peft finds by older names, too."""
    if any(parameter.dim() > 2 for parameter in network.parameters()):
        return []
    names = [f".{name}" for name, _ in network.named_modules()]
    return [target for target in targets if not any(name.endswith(f".{target}") for name in names)]


def _maps(network: nn.Module) -> str:
    """What the maps of ``network`` are called, without their layers."""
    maps = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    return ", ".join(sorted({name.rpartition(".")[2] for name in maps}))


def leave_out_tied(model: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """A hook on ``state_dict``: without the output map that is the embedding itself.

    Under its second name it would pass for a parameter of its own, and for one that is not frozen.
    """
    for name, module in model.named_modules():
        head, embedding = getattr(module, "lm_head", None), getattr(module, "get_input_embeddings", None)
        if head is not None and embedding is not None and head.weight is embedding().weight:
            state.pop(f"{prefix}{name}.lm_head.weight", None)
