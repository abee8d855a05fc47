"""Tiny random causal language models whose tokens are bytes: they run in a moment anywhere, and know no word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpcmm.workloads.causal_lm import CausalLm

ARCHITECTURES = ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Those that can be made tiny, by the ``model_type`` of ``transformers``."""
WITH_EXPERTS = ("mixtral", "qwen3_moe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large a tiny network is."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 128
    experts: int = 4
    """Of a layer, in architectures with experts."""
    experts_per_token: int = 2
    router_loss: bool = False
    """Whether experts that are chosen unevenly cost something."""
    longest: int = 2048
    """Tokens of a sequence at most."""


def build_tiny_lm(
    architecture: str = "llama", sizes: Sizes | None = None, *, tokenizer: Any = None, attention: str | None = None
) -> CausalLm:
    """A network of one of ARCHITECTURES with weights from PyTorch's random state.

    ``tokenizer``: what its tokens are; None: bytes. ``attention``: as ``transformers`` names it; None: its default.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - takes seconds

    tokenizer = bytes_tokenizer() if tokenizer is None else tokenizer
    config = _config(architecture, sizes or Sizes(), tokenizer)
    options = {} if attention is None else {"attn_implementation": attention}
    return CausalLm(AutoModelForCausalLM.from_config(config, **options), tokenizer)


def bytes_tokenizer() -> Any:
    """A tokenizer that knows 256 bytes, a first token and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - takes seconds

    first, end = specials = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=first, eos_token=end, pad_token=end)


def _config(architecture: str, sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import AutoConfig  # noqa: PLC0415

    assert architecture in ARCHITECTURES, architecture
    experts = {}
    if architecture in WITH_EXPERTS:
        experts = {
            "num_local_experts": sizes.experts,
            "num_experts_per_tok": sizes.experts_per_token,
            "output_router_logits": sizes.router_loss,
        }
    if architecture == "qwen3_moe":
        experts |= {"moe_intermediate_size": sizes.intermediate, "norm_topk_prob": True}
    return AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.width // sizes.heads,
        max_position_embeddings=sizes.longest,
        # So that a map keeps the size of what it is given: the default, 0.02, is for widths near 1000.
        initializer_range=sizes.width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **experts,
    )
