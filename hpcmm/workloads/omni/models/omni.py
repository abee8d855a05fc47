"""A causal language model that also takes images, sounds, and whatever else a modality makes tokens of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpcmm.config.parts import build_part
from hpcmm.train.attention import NAME as ATTENTION
from hpcmm.train.structure import Row, Structure, TokenLoss
from hpcmm.workloads.causal_lm import leave_out_tied
from hpcmm.workloads.omni.data.batch import Batch
from hpcmm.workloads.omni.models.language_model import build_language_model
from hpcmm.workloads.omni.models.modalities.modality import Modality
from hpcmm.workloads.omni.models.trunk import Trunk
from hpcmm.workloads.omni.schema import MODALITY, ModelConfig


class OmniModel(nn.Module):
    """Conversations to the loss of their answers' tokens.

    A modality's encoder and connector make tokens of each thing, which are written at their places between those of
    the text. Source of the idea: H. Liu et al., "Visual Instruction Tuning", NeurIPS 2023.
    """

    def __init__(self, network: Any, modalities: Mapping[str, Modality]) -> None:
        super().__init__()
        self.trunk = Trunk(network)
        self.modalities = nn.ModuleDict(modalities)
        words = network.get_input_embeddings().weight
        for key, modality in modalities.items():
            modality.key = key
            modality.connector.match(words)
        self.register_state_dict_post_hook(leave_out_tied)  # type: ignore[no-untyped-call]

    def forward(self, batch: Batch) -> TokenLoss:
        loss: TokenLoss = self.trunk(*self.embed(batch))
        return loss

    def embed(self, batch: Batch) -> Row:
        """A packed row as the trunk takes it: embedded tokens (1, S, width), positions and labels, both (1, S)."""
        row: Tensor = self.trunk.lm.get_input_embeddings()(batch.tokens)[0]
        for key, modality in self.readers().items():
            part = batch.modalities.get(key)
            if part is not None and len(part.prepared):
                row = row.index_copy(0, part.places, modality(part.prepared).to(row.dtype))
            elif _must_run(modality):
                row = row + 0 * modality([modality.example().to(row.device)]).sum().to(row.dtype)
        return Row(row[None], batch.positions, batch.labels)

    @property
    def vocabulary(self) -> int:
        """How many tokens the language model has embeddings of."""
        return int(self.trunk.lm.get_input_embeddings().num_embeddings)

    def readers(self) -> dict[str, Modality]:
        """The modalities by what a conversation calls them."""
        return {key: each for key, each in self.modalities.items() if isinstance(each, Modality)}

    def structure(self) -> Structure:
        """Which part is what, for recipes that cut the model."""
        return Structure(
            embed=self.embed,
            embedders={f"modalities.{key}": each for key, each in self.readers().items()},
            trunk=self.trunk,
            network=self.trunk.lm,
            network_name="trunk.lm",
            head=self.trunk.head,
        )


def _must_run(modality: Modality) -> bool:
    """Whether a batch without anything of this modality still runs through it, so that all ranks run the same.

    Parameters that train must have gradients on each rank, and those that ZeRO stage 3 has cut are gathered together.
    """
    trains = torch.is_grad_enabled() and any(each.requires_grad for each in modality.parameters())
    return trains or any(hasattr(each, "ds_id") for each in modality.parameters())


def build_model(
    config: ModelConfig, seed: int = 0, *, tokenizer: Any = None, attention: str | None = ATTENTION
) -> OmniModel:
    """The model with weights that depend on ``config`` and ``seed`` alone; the global random state is left as it was.

    ``tokenizer``: of a tiny language model; None: of bytes. ``attention``: the language model's, as ``transformers``
    names it; a packed row needs the default one.
    Raises HpcmmError for weights that cannot be read, and for parts that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        language = build_language_model(config.language_model, tokenizer, attention)
        modalities: dict[str, Any] = {
            key: build_part(part, MODALITY, width=language.width)
            for key, part in config.modalities.items()
            if part is not None
        }
        return OmniModel(language.network, modalities)
