"""A small file in the published ImageBind checkpoint's layout, and the network that it is of, written by its paper's
description with PyTorch's own attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, TEXT_WIDTH, DEPTH, TEXT_DEPTH = 64, 32, 5, 3
PATCH, GRID, JOINT, VOCABULARY, LONGEST = 14, 3, 24, 50, 12
HEADS = 16


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Names and shapes as published, but for the sizes; with tensors of other modalities, which must not disturb."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state = {
        "modality_preprocessors.vision.cls_token": normal(1, 1, WIDTH),
        "modality_preprocessors.vision.rgbt_stem.proj.1.weight": normal(WIDTH, 3, 2, PATCH, PATCH) / PATCH,
        "modality_preprocessors.vision.pos_embedding_helper.pos_embed": normal(1, 1 + GRID * GRID, WIDTH),
        "modality_preprocessors.text.pos_embed": normal(1, LONGEST, TEXT_WIDTH),
        "modality_preprocessors.text.mask": torch.full((LONGEST, LONGEST), -torch.inf).triu(1),
        "modality_preprocessors.text.token_embedding.weight": normal(VOCABULARY, TEXT_WIDTH),
        "modality_preprocessors.audio.cls_token": normal(1, 1, 8),
        "modality_trunks.vision.pre_transformer_layer.0.weight": 1 + normal(WIDTH),
        "modality_trunks.vision.pre_transformer_layer.0.bias": normal(WIDTH),
        "modality_heads.vision.0.weight": 1 + normal(WIDTH),
        "modality_heads.vision.0.bias": normal(WIDTH),
        "modality_heads.vision.2.weight": normal(JOINT, WIDTH),
        "modality_heads.text.proj.0.weight": 1 + normal(TEXT_WIDTH),
        "modality_heads.text.proj.0.bias": normal(TEXT_WIDTH),
        "modality_heads.text.proj.1.weight": normal(JOINT, TEXT_WIDTH),
        "modality_postprocessors.text.1.log_logit_scale": torch.tensor(2.6),
    }
    for modality, width, depth in (("vision", WIDTH, DEPTH), ("text", TEXT_WIDTH, TEXT_DEPTH)):
        for number in range(depth):
            block = f"modality_trunks.{modality}.blocks.{number}"
            state |= {
                f"{block}.attn.in_proj_weight": normal(3 * width, width),
                f"{block}.attn.in_proj_bias": normal(3 * width),
                f"{block}.attn.out_proj.weight": normal(width, width),
                f"{block}.attn.out_proj.bias": normal(width),
                f"{block}.norm_1.weight": 1 + normal(width),
                f"{block}.norm_1.bias": normal(width),
                f"{block}.mlp.fc1.weight": normal(4 * width, width),
                f"{block}.mlp.fc1.bias": normal(4 * width),
                f"{block}.mlp.fc2.weight": normal(width, 4 * width),
                f"{block}.mlp.fc2.bias": normal(width),
                f"{block}.norm_2.weight": 1 + normal(width),
                f"{block}.norm_2.bias": normal(width),
            }
    return state


def blocks(state: dict[str, Tensor], modality: str, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The tokens (B, L, C) after each block of a trunk."""
    width, states, number = tokens.shape[-1], [], 0
    while f"modality_trunks.{modality}.blocks.{number}.norm_1.weight" in state:
        of = {
            name.removeprefix(f"modality_trunks.{modality}.blocks.{number}."): value
            for name, value in state.items()
            if name.startswith(f"modality_trunks.{modality}.blocks.{number}.")
        }
        attention = nn.MultiheadAttention(width, HEADS)
        attention.load_state_dict({name[5:]: value for name, value in of.items() if name.startswith("attn.")})
        inner = functional.layer_norm(tokens, (width,), of["norm_1.weight"], of["norm_1.bias"], 1e-6).transpose(0, 1)
        mixed, _ = attention(inner, inner, inner, need_weights=False, attn_mask=mask)
        tokens = tokens + mixed.transpose(0, 1)
        inner = functional.layer_norm(tokens, (width,), of["norm_2.weight"], of["norm_2.bias"], 1e-6)
        inner = functional.gelu(functional.linear(inner, of["mlp.fc1.weight"], of["mlp.fc1.bias"]))
        tokens = tokens + functional.linear(inner, of["mlp.fc2.weight"], of["mlp.fc2.bias"])
        states.append(tokens)
        number += 1
    return states


def vision(state: dict[str, Tensor], pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """The tokens after each block, and the embedding, of pixels in the encoder's own scale."""
    film = pixels.unsqueeze(2).repeat(1, 1, 2, 1, 1)
    stem = state["modality_preprocessors.vision.rgbt_stem.proj.1.weight"]
    patches = functional.conv3d(film, stem, stride=stem.shape[2:]).flatten(2).transpose(1, 2)
    first = state["modality_preprocessors.vision.cls_token"].expand(len(pixels), -1, -1)
    tokens = torch.cat([first, patches], dim=1) + state["modality_preprocessors.vision.pos_embedding_helper.pos_embed"]
    start = "modality_trunks.vision.pre_transformer_layer.0"
    tokens = functional.layer_norm(tokens, (WIDTH,), state[f"{start}.weight"], state[f"{start}.bias"], 1e-6)
    states = blocks(state, "vision", tokens)
    head = functional.layer_norm(
        states[-1], (WIDTH,), state["modality_heads.vision.0.weight"], state["modality_heads.vision.0.bias"], 1e-6
    )
    return states, functional.linear(head[:, 0], state["modality_heads.vision.2.weight"])


def text(state: dict[str, Tensor], numbers: Tensor) -> Tensor:
    """The embedding of token numbers (B, LONGEST), zeros after the end token, which has the largest number."""
    tokens = state["modality_preprocessors.text.token_embedding.weight"][numbers]
    tokens = tokens + state["modality_preprocessors.text.pos_embed"]
    states = blocks(state, "text", tokens, state["modality_preprocessors.text.mask"])[-1]
    ends = states[torch.arange(len(numbers)), numbers.argmax(dim=1)]
    head = functional.layer_norm(
        ends,
        (TEXT_WIDTH,),
        state["modality_heads.text.proj.0.weight"],
        state["modality_heads.text.proj.0.bias"],
        1e-6,
    )
    return functional.linear(head, state["modality_heads.text.proj.1.weight"])
