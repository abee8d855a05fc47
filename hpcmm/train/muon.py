"""Muon for the matrices of the hidden layers, AdamW for all else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn

_NOT_HIDDEN = ("embed", "lm_head")
"""In the name of a parameter: tokens look it up, or it gives their scores, so that its rows have no common scale."""


class Muon(MuonWithAuxAdam):  # type: ignore[misc]
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

    DeepSpeed's class. A group's ``lr`` is AdamW's, its ``muon_lr`` Muon's. Under ZeRO, DeepSpeed clips what Muon makes
    of a gradient in place of the gradient, so the same run would train otherwise: hence it is refused there.
    """

    whole_parameters = True

    def __init__(
        self,
        params: Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        muon_lr: float = 0.02,
        momentum: float = 0.95,
    ) -> None:
        """``params``: groups whose parameters :meth:`see_model` has seen."""
        groups: list[dict[str, Any]] = []
        for group in params:
            decay = group.get("weight_decay", weight_decay)
            rates = {
                True: {"lr": group.get("muon_lr", muon_lr), "momentum": momentum},
                False: {"lr": group.get("lr", lr), "betas": group.get("betas", betas), "eps": eps},
            }
            for use_muon, values in rates.items():
                if members := [each for each in group["params"] if getattr(each, "use_muon", False) is use_muon]:
                    groups.append({"params": members, "use_muon": use_muon, "weight_decay": decay, **values})
        super().__init__(groups)

    @staticmethod
    def see_model(model: nn.Module) -> None:
        """Note at each parameter, as DeepSpeed looks for it, whether Muon is to train it."""
        embedded = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
        for name, parameter in model.named_parameters():
            is_hidden = parameter.dim() >= 2 and not any(word in name.lower() for word in _NOT_HIDDEN)
            parameter.use_muon = is_hidden and id(parameter) not in embedded  # type: ignore[attr-defined]
