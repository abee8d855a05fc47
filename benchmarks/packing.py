"""Packing against padding: tokens a second of training steps, side by side.

    python benchmarks/packing.py [--examples 8] [--median 96] [--spread 0.8] [--turns 5] [--json FILE]

The micro-batches are those of the omni-modal workload, with and without ``data.packed``: their lengths are lognormal,
as ``data.text_words`` and ``data.text_spread`` say of its text. A step is the forward and backward pass of a LLaMA of 2
layers on one core. Only tokens of the examples count. The two take turns, and each turn takes the same examples.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import measuring

if TYPE_CHECKING:
    from hpcmm.workloads.omni.data.batch import Batch

VOCABULARY, WIDTH, LAYERS = 1024, 256, 2


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--examples", type=measuring.positive, default=8, help="of a micro-batch; default 8")
    parser.add_argument("--median", type=measuring.positive, default=96, help="median length in tokens; default 96")
    parser.add_argument("--spread", type=float, default=0.8, help="standard deviation of the length's logarithm")
    parser.add_argument("--turns", type=measuring.positive, default=5, help="micro-batches of each; default 5")
    rows = measure(parser.parse_args())
    for row in rows:
        print(
            f"{row['micro_batch']:>7}: {row['examples_median_tokens_per_s']:8.0f} tokens/s of examples, "
            f"{row['all_median_tokens_per_s']:8.0f} with the padding ({row['padding']:.0%} of the tokens); "
            f"{row['times_as_fast']:.2f} times as fast as padded"
        )
    measuring.write(parser.parse_args().json, "packing", rows)


def measure(options: argparse.Namespace) -> list[measuring.Row]:
    """One row for each kind of micro-batch."""
    import torch  # noqa: PLC0415

    from hpcmm.workloads.omni.data.batch import pack, pad  # noqa: PLC0415

    torch.set_num_threads(1)
    network = _network()
    generator = torch.Generator().manual_seed(0)
    made = {"padded": pad, "packed": pack}
    turns = [_examples(options, generator) for _ in range(options.turns + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in made}
    tokens: dict[str, list[int]] = {name: [] for name in made}
    for number, examples in enumerate(turns):
        for name in sorted(made, reverse=bool(number % 2)):
            batch = made[name](examples)
            start = time.perf_counter()
            _step(network, batch)
            if number:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
                tokens[name].append(batch.tokens.shape[1])
    useful = [sum(each.tokens.shape[1] for each in examples) for examples in turns[1:]]
    speeds = {name: [of / spent for of, spent in zip(useful, seconds[name], strict=True)] for name in made}
    all_speeds = {name: [n / spent for n, spent in zip(tokens[name], seconds[name], strict=True)] for name in made}
    ratios = [packed / padded for packed, padded in zip(speeds["packed"], speeds["padded"], strict=True)]
    return [
        {
            "micro_batch": name,
            **measuring.summary(speeds[name], "tokens_per_s", "examples"),
            **measuring.summary(all_speeds[name], "tokens_per_s", "all"),
            "padding": 1 - sum(useful) / sum(tokens[name]),
            "times_as_fast": statistics.median(ratios) if name == "packed" else 1.0,
        }
        for name in made
    ]


def _network() -> Any:
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from hpcmm.train.attention import NAME  # noqa: PLC0415

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2**15,
            attn_implementation=NAME,
        )
    )


def _examples(options: argparse.Namespace, generator: object) -> list[Batch]:
    import torch  # noqa: PLC0415

    from hpcmm.workloads.omni.data.batch import Batch  # noqa: PLC0415

    drawn = torch.randn(options.examples, generator=generator) * options.spread
    lengths = (options.median * drawn.exp()).round().long().clamp(2, 2048).tolist()
    return [
        Batch(
            tokens=(tokens := torch.randint(0, VOCABULARY, (1, length), generator=generator)),
            positions=torch.arange(length).unsqueeze(0),
            labels=tokens.roll(-1, 1),
            modalities={},
        )
        for length in lengths
    ]


def _step(network: Any, batch: Batch) -> None:
    from torch.nn.functional import cross_entropy  # noqa: PLC0415

    network.zero_grad()
    logits = network(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits[0]
    cross_entropy(logits, batch.labels[0], ignore_index=-100, reduction="sum").backward()


if __name__ == "__main__":
    main()
