"""The sizes of a transformer, as the login node may know them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer, for what a mesh may cut and for the floating-point operations of a step."""

    layers: int
    width: int
    """Length of a token's hidden state."""
    heads: int
    kv_heads: int
    """Heads of keys and values, which groups of ``heads`` share."""
    head_width: int
    intermediate: int
    """Inner width of a layer's feed-forward network; of each expert if there are some."""
    vocabulary: int
    experts: int = 0
    """Experts of a layer; 0 without."""
    experts_per_token: int = 0
    dense_intermediate: int = 0
    """Inner width of the layers without experts, in a network that also has layers with some; 0 without."""
    tied_embeddings: bool = False
    """Whether the output map is the embedding itself."""
    frozen: bool = False
    """Whether its own weights stay as they are."""
