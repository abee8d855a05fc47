"""The bytes that a rank exchanges in a step of each recipe, as the literature counts them. Pure: sizes in, bytes out.

N are the bytes of the trained parameters that a rank holds, n the ranks of a group, S the tokens of its row, W the
width of the network, e the bytes of an element. A payload is the largest of a collective's input and output.

- ZeRO 0: an all-reduce of the gradients, N. ZeRO 1 and 2: their reduction, N, and an all-gather of the updated
  parameters, N. ZeRO 3: parameters twice, gradients once, 3 N; of parameters that stay whole an all-gather after the
  step in place of those two. S. Rajbhandari et al., "ZeRO", 2020, section 7.
- Ulysses: per layer and pass, queries, keys and values to all ranks of the sequence, and what attention makes back.
- Ring: per layer and pass, keys and values to n - 1 neighbours; backward also their gradients, in float32.
- Pipeline: per boundary, S W e of hidden states one way, and of gradients the other.
- Tensor: per layer four all-reduces of S W e. M. Shoeybi et al., "Megatron-LM", 2020, section 3.
- Encoders beside tensor ranks: of each the number of its features and the features, padded to the longest share, and
  the gradients of the encoder.
- Expert: per layer four all-to-alls of S K W e, if the tokens are spread evenly over the experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hpcmm.config.mesh import Mesh

E = 4
"""Bytes of an element in float32."""
TOKENS, LOSS, LOSS_AND_LABELS, ROW_LENGTH, PLACES = 8, 8, 16, 1024, 8
"""The step's number of labelled tokens, over all ranks, in float64; the loss of a sequence that ranks divide, the same;
what a pipeline's last stage tells the others, two float64; the length of a row, and its positions and labels a token,
with which hidden states travel."""
NORM, NORM_OF_ZERO_3 = 4, 8
"""The square of the gradients' norm: DeepSpeed sums it over each group that has a part of it."""
ROWS = 8
"""The number of features that a rank has made, in front of them."""
COUNTS = 4
"""The number of tokens that an expert gets, in front of the tokens."""


@dataclass(frozen=True)
class Held:
    """What a rank has of a model, and works on."""

    shared: int
    """Elements of trained parameters that the ranks of its data axis all have."""
    experts: int = 0
    """Elements of its own experts."""
    layers: int = 0
    tokens: int = 0
    width: int = 0
    per_token: int = 0
    """Experts that a token goes to."""
    all_experts: int = 0
    encoder: int = 0
    """Elements of encoders that tensor ranks share the work of."""
    features: int = 0
    """Those of the rank that makes the most."""
    whole: int = 0
    """Elements of ``shared`` that ZeRO 3 does not divide."""

    @property
    def row(self) -> int:
        """Bytes of a row's hidden states."""
        return self.tokens * self.width * E


def bytes_of(
    mesh: Mesh, rank: int, zero: int, held: Held, *, ring: bool = False, micro_batches: int = 1
) -> dict[str, int]:
    """Of one step, by what the groups are for, with all that the constants above name.

    Of several micro-batches only for data parallelism.
    """
    found: Counter[str] = Counter()
    replicas = "data_x_sequence" if mesh.sequence > 1 and mesh.data > 1 else "sequence" if mesh.sequence > 1 else "data"
    axes = [axis for axis in ("pipeline", "data", "sequence", "tensor") if getattr(mesh, axis) > 1]
    everybody = axes[0] if len(axes) == 1 else replicas if set(axes) == {"data", "sequence"} else "other"
    found[everybody] += TOKENS
    if mesh.data * mesh.sequence > 1:
        found[replicas] += of_zero(zero, held.shared, held.whole, micro_batches)
        found[replicas] += NORM_OF_ZERO_3 if zero == 3 else NORM
    if mesh.sequence > 1:
        found["sequence"] += LOSS
        found["sequence"] += held.layers * (of_ring(held, mesh.sequence) if ring else of_ulysses(held, mesh.sequence))
    if mesh.tensor > 1:
        found["tensor"] += 4 * held.layers * held.row + (of_encoder(held, mesh.tensor) if held.encoder else 0)
    if mesh.pipeline > 1:
        found["pipeline"] += of_pipeline(held, mesh, rank) + LOSS_AND_LABELS
    if mesh.tensor * mesh.pipeline > 1:  # the ranks that have a model between them
        norm_over = "other" if min(mesh.tensor, mesh.pipeline) > 1 else "tensor" if mesh.tensor > 1 else "pipeline"
        found[norm_over] += NORM
    if mesh.expert > 1:
        found["expert"] += held.layers * (4 * held.row * held.per_token + COUNTS * held.all_experts)
        found["replicas_of_experts"] += of_zero(zero, held.experts) + NORM
        found["data"] += NORM  # of the experts, over all
    return dict(found)


def of_zero(stage: int, elements: int, whole: int = 0, micro_batches: int = 1) -> int:
    """Over the ranks that have the same parameters. ZeRO 2 and 3 reduce the gradients of each micro-batch."""
    divided = elements - whole
    of_stage_3 = 3 * micro_batches * divided + (micro_batches + 1) * whole
    return E * {0: elements, 1: 2 * elements, 2: (micro_batches + 1) * elements, 3: of_stage_3}[stage]


def of_ulysses(held: Held, ranks: int) -> int:
    """A layer's: queries, keys and values there and what attention makes back, and their gradients."""
    return 2 * (3 + 1) * held.row // ranks


def of_ring(held: Held, ranks: int) -> int:
    """A layer's: keys and values in both passes, and their gradients."""
    return 3 * (ranks - 1) * 2 * held.row // ranks


def of_encoder(held: Held, ranks: int) -> int:
    """Features of all ranks, and gradients, of which each rank has a part."""
    return ranks * (ROWS + held.features * held.width * E) + held.encoder * E


def of_pipeline(held: Held, mesh: Mesh, rank: int) -> int:
    """Sent forward by all stages but the last, and backward by all but the first."""
    stage = mesh.coordinates(rank)["pipeline"]
    forward = held.row + PLACES * held.tokens + ROW_LENGTH if stage < mesh.pipeline - 1 else 0
    return forward + (held.row if stage > 0 else 0)
