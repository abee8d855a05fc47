"""The sizes of a run's language model as far as a machine without torch can know them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpcmm.config.mesh import DATA, EXPERT, PIPELINE, SEQUENCE, TENSOR
from hpcmm.config.model_shape import ModelShape
from hpcmm.config.parts import class_attribute, part_name
from hpcmm.files import read_text
from hpcmm.text import visible
from hpcmm.workloads.omni.schema import ARCHITECTURES, WITH_EXPERTS, LanguageModelKind, OmniConfig

_CONFIG = "config.json"
_SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
"""Of SmolLM2-135M, whose folder is made on a node."""
_OF_THE_LONGEST = ("dynamic", "longrope")
"""Rotary embeddings that depend on how long the longest example of a row is."""
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
_OF_UPDATES = ("hidden_size",)
_OF_WEIGHTS = (*_OF_UPDATES, "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""What a run must have as the one whose weights it takes; layers may be added."""
_ROUTER = "gate"
"""The map of each layer that chooses a token's experts."""


def network_settings(config: OmniConfig) -> Mapping[str, Any]:
    """The network's ``config.json``, or the same of one without a folder; empty if this machine cannot read it."""
    return _network_settings(asdict(config.model.language_model), config.data.vocabulary)


def _network_settings(language: Mapping[str, Any], vocabulary: Any) -> Mapping[str, Any]:
    """Of what ``model.language_model`` holds. Raises KeyError or TypeError if that is no such configuration."""
    if language["kind"] == LanguageModelKind.smollm2:
        return _SMOLLM2
    if language["kind"] == LanguageModelKind.tiny:
        tiny = language["tiny"]
        return {
            "model_type": language["architecture"],
            "num_hidden_layers": tiny["layers"],
            "hidden_size": tiny["width"],
            "num_attention_heads": tiny["heads"],
            "num_key_value_heads": tiny["kv_heads"],
            "intermediate_size": tiny["intermediate"],
            "vocab_size": vocabulary,
            "tie_word_embeddings": True,
            "num_local_experts": tiny["experts"],
            "num_experts_per_tok": tiny["experts_per_token"],
            "output_router_logits": tiny["router_loss"],
        }
    return _settings_in(language["path"]) if language["path"] else {}


def start_problems(config: OmniConfig, before: Mapping[str, Any]) -> Iterator[str]:
    """Which size of the language model differs from that of a run whose weights this one takes.

    ``before``: that run's configuration, untrusted. Of a frozen network the run saved no weights, but connectors and
    updates that are as wide as it is.
    """
    try:
        language = before["model"]["language_model"]
        then = _network_settings(language, before["data"]["vocabulary"])
        sizes = _OF_UPDATES if language["frozen"] else _OF_WEIGHTS
    except (KeyError, TypeError):
        return
    now = network_settings(config)
    for size in sizes:
        one, other = then.get(size), now.get(size)
        if isinstance(one, int) and isinstance(other, int) and one != other:
            yield (
                f"has a language model whose {size} is {one}, but this run's is {other}, so that the weights do not "
                "fit: give this run the same model, or leave init_from out."
            )


def _settings_in(folder: str) -> Mapping[str, Any]:
    try:
        return _object_in(Path(folder, _CONFIG).expanduser())
    except (OSError, ValueError, RuntimeError, RecursionError):  # another machine's file: a rank says what is wrong
        return {}


def _object_in(file: Path) -> Mapping[str, Any]:
    """Raises ValueError, or RecursionError, if it is no JSON object, and OSError or RuntimeError if it is not here."""
    content = json.loads(read_text(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no object")
    return content


def _is_damaged(folder: str) -> bool:
    """Whether this machine can read the folder's settings, and they are none."""
    try:
        _object_in(Path(folder, _CONFIG).expanduser())
    except (ValueError, RecursionError):
        return True
    except (OSError, RuntimeError):
        return False
    return False


def problems(config: OmniConfig) -> Iterator[str]:
    """What the ``config.json`` of a network or an encoder has that does not fit, if this machine can read it."""
    yield from _encoder_problems(config)
    found, path = network_settings(config), config.model.language_model.path
    if path and not found and _is_damaged(path):
        yield (
            f"model.language_model.path is {path}, whose {_CONFIG} cannot be read as a JSON object: copy the "
            "folder anew, or name another."
        )
    kind = found.get("model_type")
    if kind is not None and kind not in ARCHITECTURES:
        yield (
            f"model.language_model.path is {path}, a model of type {visible(str(kind))}, but this workload takes "
            f"{', '.join(ARCHITECTURES)}: name a folder of one of these."
        )
    for size in _SIZES if config.model.language_model.kind is LanguageModelKind.folder else ():
        if isinstance(found.get(size), int) and found[size] < 1:
            yield f"model.language_model.path is {path}, whose {_CONFIG} has {size} {found[size]}: name another folder."
    if config.parallel.mesh.get(EXPERT, 1) not in {0, 1}:
        yield from _expert_problems(config, found)
    rotary = found.get("rope_parameters") or found.get("rope_scaling")
    if not isinstance(rotary, dict):
        return
    form = rotary.get("rope_type", rotary.get("type"))
    most = rotary.get("original_max_position_embeddings") if form == "longrope" else None
    most = most or found.get("max_position_embeddings")
    if form in _OF_THE_LONGEST and isinstance(most, int) and config.data.max_tokens > most:
        yield (
            f"data.max_tokens is {config.data.max_tokens}, but the language model's positions (rope_type {form}) "
            f"change for all conversations of a row if one is longer than {most} tokens: set data.max_tokens={most}."
        )


def _expert_problems(config: OmniConfig, found: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed's AutoEP does not take over from a network whose experts are divided."""
    language, instead = config.model.language_model, "or leave parallel.mesh.expert out."
    if language.lora_rank and _ROUTER in {target.rpartition(".")[2] for target in language.lora_targets}:
        yield (
            f"model.language_model.lora_targets has {_ROUTER}, the router, whose updates DeepSpeed's AutoEP leaves "
            f"out: take it out of these, {instead}"
        )
    if found.get("router_jitter_noise"):
        yield (
            f"model.language_model.path is {language.path}, whose {_CONFIG} has router_jitter_noise, which DeepSpeed's "
            f"AutoEP leaves out: set it to 0 there, {instead}"
        )
    if found.get("model_type") in WITH_EXPERTS and not _has_layers(found, dense=False):
        yield (
            f"model.language_model.path is {language.path}, of whose layers none has experts (mlp_only_layers, "
            "decoder_sparse_step): leave parallel.mesh.expert out."
        )


def _has_layers(found: Mapping[str, Any], *, dense: bool) -> bool:
    """Whether a network with experts has layers without some, or, if not ``dense``, layers with some.

    If the settings do not tell, all layers have experts.
    """
    layers, every, listed = (found.get(key) for key in ("num_hidden_layers", "decoder_sparse_step", "mlp_only_layers"))
    if not isinstance(layers, int):
        return not dense
    every = every if isinstance(every, int) and every > 0 else 1
    without = {layer for layer in listed if isinstance(layer, int)} if isinstance(listed, list) else set()
    return any((layer in without or (layer + 1) % every != 0) is dense for layer in range(layers))


def _encoder_problems(config: OmniConfig) -> Iterator[str]:
    for name, part in config.model.modalities.items():
        if not isinstance(part, Mapping) or not isinstance(folder := part.get("weights"), str):
            continue
        kind, fitting = _settings_in(folder).get("model_type"), class_attribute(part, "model_types")
        if kind is not None and fitting and kind not in fitting:
            yield (
                f"model.modalities.{name}.weights is {folder}, a model of type {visible(str(kind))}, but "
                f"{part_name(part)} takes {', '.join(fitting)}: name a folder of one of these."
            )


def axes(config: OmniConfig) -> frozenset[str]:
    """Along which axes of a mesh the language model can be cut; experts only if it has some."""
    kind = network_settings(config).get("model_type")
    if kind is not None and kind not in ARCHITECTURES:
        return frozenset({DATA})
    without = frozenset({DATA, SEQUENCE, TENSOR, PIPELINE})
    return without if kind is not None and kind not in WITH_EXPERTS else without | {EXPERT}


def model_shape(config: OmniConfig) -> ModelShape | None:
    """The language model's sizes; None if this machine cannot know them."""
    found = network_settings(config)
    try:
        heads, width = int(found["num_attention_heads"]), int(found["hidden_size"])
        has_experts = found.get("model_type") in WITH_EXPERTS
        experts = int(found.get("num_local_experts") or found.get("num_experts") or 0) if has_experts else 0
        inner = found.get("moe_intermediate_size") if experts else None
        return ModelShape(
            layers=int(found["num_hidden_layers"]),
            width=width,
            heads=heads,
            kv_heads=int(found.get("num_key_value_heads") or heads),
            head_width=int(found.get("head_dim") or width // heads),
            intermediate=int(inner or found["intermediate_size"]),
            vocabulary=int(found["vocab_size"]),
            experts=experts,
            experts_per_token=int(found.get("num_experts_per_tok") or 0) if experts else 0,
            dense_intermediate=int(found["intermediate_size"]) if experts and _has_layers(found, dense=True) else 0,
            tied_embeddings=bool(found.get("tie_word_embeddings")),
            frozen=config.model.language_model.frozen,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
