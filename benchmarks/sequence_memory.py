"""Peak activation memory of a step at sequence degrees 1, 2 and 4, for Ulysses and for ring attention, on CPUs.

    python benchmarks/sequence_memory.py [--tokens 2048] [--json FILE]

Every allocation and release of a rank's forward and backward pass is taken from PyTorch's profiler, kernels' own
scratch memory included; the peak of their sum is what the step holds beside weights and gradients, which are there
before it. The row of tokens is embedded whole on each rank, as the recipe does it. Fails if degree 4 needs more than
0.35 of degree 1. The numbers depend on no clock.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import measuring

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import nn

FORMS = ("ulysses", "ring")
DEGREES = (1, 2, 4)
MOST = 0.35
"""Of degree 1 at degree 4."""
VOCABULARY, WIDTH, LAYERS = 1024, 256, 4


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that ``step`` holds at a time of what it allocates."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--tokens", type=measuring.positive, default=2048, help="of the row; default 2048")
    options = parser.parse_args()
    rows = []
    peaks = measure(options.tokens)
    for (form, degree), peak in peaks.items():
        of_one = peak / peaks[form, 1]
        rows.append({"attention": form, "degree": degree, "peak_mb": peak / 1e6, "of_degree_1": of_one})
        print(f"{form:>8}, degree {degree}: {peak / 1e6:7.1f} MB, {of_one:.3f} of degree 1")
    measuring.write(options.json, "sequence_memory", rows)
    if any(row["degree"] == DEGREES[-1] and row["of_degree_1"] > MOST for row in rows):
        sys.exit(f"degree {DEGREES[-1]} needs more than {MOST} of the activation memory of degree 1")


def measure(tokens: int) -> dict[tuple[str, int], int]:
    """The largest peak of a rank in bytes, by form of attention and degree."""
    from torch import multiprocessing  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_rank, (tokens, folder), DEGREES[-1], start_method="spawn")
        ranks = [json.loads(Path(folder, str(rank)).read_text(encoding="utf-8")) for rank in range(DEGREES[-1])]
    return {
        (form, degree): max(peaks.get(f"{form} {degree}", 0) for peaks in ranks) for form in FORMS for degree in DEGREES
    }


def _rank(rank: int, tokens: int, folder: str) -> None:
    """The ranks below the degree work on a row, the others wait for the next."""
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    from hpcmm.worker.distributed import leave_group  # noqa: PLC0415

    torch.set_num_threads(1)
    ranks = DEGREES[-1]
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    groups = {degree: dist.new_group(list(range(degree))) for degree in DEGREES}
    peaks = {}
    for form in FORMS:
        for degree, group in groups.items():
            if rank < degree:
                peaks[f"{form} {degree}"] = _peak(form, group if degree > 1 else None, tokens)
            dist.barrier()
    Path(folder, str(rank)).write_text(json.dumps(peaks), encoding="utf-8")
    leave_group()


def _peak(form: str, group: dist.ProcessGroup | None, tokens: int) -> int:
    import torch  # noqa: PLC0415

    from hpcmm.config.schema import SequenceAttention  # noqa: PLC0415
    from hpcmm.train.recipes.sequence import shard_sequence  # noqa: PLC0415
    from hpcmm.train.structure import Row, Structure  # noqa: PLC0415

    trunk = _trunk()
    embedding = trunk.network.get_input_embeddings()
    if group is not None:
        structure = Structure(Row, {}, trunk, trunk.network, "network", lambda *_: None)
        shard_sequence(structure, group, SequenceAttention(form))
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, VOCABULARY, (1, tokens), generator=generator)
    positions = torch.cat([torch.arange(tokens // 2), torch.arange(tokens - tokens // 2)]).unsqueeze(0)

    def step() -> None:
        trunk(embedding(row), positions, row.roll(-1, 1)).total.backward()

    step()  # afterwards the gradients are there
    return peak_bytes(step)


def _trunk() -> nn.Module:
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415
    from torch.nn.functional import cross_entropy  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from hpcmm.train.attention import NAME  # noqa: PLC0415
    from hpcmm.train.structure import TokenLoss  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2**15,
        attn_implementation=NAME,
    )

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = LlamaForCausalLM(config)

        def forward(self, embedded: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> TokenLoss:
            logits = self.network(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0]
            total = cross_entropy(logits, labels[0], ignore_index=-100, reduction="sum")
            return TokenLoss(total, logits.argmax(-1) == labels[0])

    return Trunk()


if __name__ == "__main__":
    main()
