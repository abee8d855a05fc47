"""Memory of a language model's weights, gradients and optimizer state under each ZeRO stage, as Markdown.

    python benchmarks/zero_memory.py [--nodes 1] [--gpus-per-node 8] [--lora-rank 32] [--json FILE] [CONFIG]

CONFIG is a transformers config.json or its folder; the default is LLaMA-7B's shape. The model is made on the meta
device, so that no weight is held. ZeRO-2 and ZeRO-3 with all weights trained are DeepSpeed's own estimators. It has
none for the stages 0 and 1, nor for frozen weights: these follow from the estimators' bytes a parameter by what each
stage shares out (S. Rajbhandari et al., "ZeRO", SC 2020, section 3). Activations, buffers and fragmentation come on top
in each case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import measuring
from measuring import Row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
WEIGHT, GRADIENT, STATE = 2, 2, 4 + 4 + 8
"""Bytes a parameter, as DeepSpeed's estimators count: 16-bit weight; 16-bit gradient; float32 gradient, float32 weight
and Adam's two moments."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Model:
    """Parameters of a model, of its largest layer, and of LoRA's updates of one rank."""

    parameters: int
    largest_layer: int
    lora: int


def measure(config: PretrainedConfig, lora_rank: int) -> Model:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    largest = max(
        sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
    )
    lora = sum(
        lora_rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LORA_TARGETS
    )
    return Model(sum(parameter.numel() for parameter in model.parameters()), largest, lora)


def from_formula(stage: int, trained: int, frozen: int, ranks: int, largest_layer: int = 0) -> float:
    """GiB a GPU. Stage 1 shares out the optimizer's state, 2 also gradients, 3 also weights, the frozen ones too."""
    state, gradient, weight = STATE * trained, GRADIENT * trained, WEIGHT * (trained + frozen)
    if stage >= 1:
        state /= ranks
    if stage >= 2:
        gradient /= ranks
    if stage >= 3:
        weight = weight / ranks + 4 * largest_layer  # gathered whole, in float32 as the estimators take it
    return (state + gradient + weight) / GIB


def estimated(stage: int, model: Model, nodes: int, gpus: int, *, offload: bool) -> tuple[float, float]:
    """DeepSpeed's estimate: GiB a CPU node, and GiB a GPU."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs  # noqa: PLC0415
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs  # noqa: PLC0415

    if stage == 2:
        cpu, gpu = estimate_zero2_model_states_mem_needs(
            total_params=model.parameters, num_gpus_per_node=gpus, num_nodes=nodes, cpu_offload=offload
        )
    else:
        cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
            total_params=model.parameters,
            largest_layer_params=model.largest_layer,
            num_gpus_per_node=gpus,
            num_nodes=nodes,
            cpu_offload=offload,
            cpu_offload_params=offload,
            zero_init=True,
        )
    return cpu / GIB, gpu / GIB


def memory(model: Model, nodes: int, gpus: int) -> Iterator[Row]:
    """Each stage's need of a GPU, then with offload that of a GPU and of a node's CPU."""
    ranks = nodes * gpus
    for stage in range(4):
        lora = from_formula(stage, model.lora, model.parameters, ranks, model.largest_layer)
        if stage < 2:
            full, source = from_formula(stage, model.parameters, 0, ranks), "the same bytes"
        else:
            full, source = estimated(stage, model, nodes, gpus, offload=False)[1], "DeepSpeed's estimator"
        yield {"stage": stage, "by": source, "on_the_cpu": None, "gpu_gib": full, "gpu_with_lora_gib": lora}
    for stage in (2, 3):
        cpu, gpu = estimated(stage, model, nodes, gpus, offload=True)
        what = "optimizer" if stage == 2 else "optimizer and weights"
        row: Row = {"stage": stage, "by": "DeepSpeed's estimator", "on_the_cpu": what}
        yield row | {"gpu_gib": gpu, "node_gib": cpu}


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| ZeRO | all trained, GiB a GPU | by | frozen + LoRA, GiB a GPU |",
        "|---|---|---|---|",
    ]
    for row in rows:
        stage, gpu, source = row["stage"], row["gpu_gib"], row["by"]
        if row["on_the_cpu"] is None:
            lines.append(f"| {stage} | {gpu:.1f} | {source} | {row['gpu_with_lora_gib']:.1f} |")
        else:
            node = f"{row['node_gib']:.0f} a node"
            lines.append(f"| {stage}, {row['on_the_cpu']} on the CPU | {gpu:.1f}, and {node} | {source} | - |")
    return lines


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("config", nargs="?", type=Path)
    options = parser.parse_args()
    from transformers import AutoConfig, LlamaConfig  # noqa: PLC0415

    config = AutoConfig.from_pretrained(options.config, local_files_only=True) if options.config else LlamaConfig()
    model = measure(config, options.lora_rank)
    rows = list(memory(model, options.nodes, options.gpus_per_node))
    print(
        f"{model.parameters / 1e9:.2f} billion parameters, {model.largest_layer / 1e6:.0f} million in the largest; "
        f"LoRA of rank {options.lora_rank} on {', '.join(LORA_TARGETS)}: {model.lora / 1e6:.1f} million. "
        f"{options.nodes} x {options.gpus_per_node} GPUs.\n"
    )
    print("\n".join(table(rows)))
    measuring.write(options.json, "zero_memory", rows)


if __name__ == "__main__":
    main()
