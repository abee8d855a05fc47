"""A launcher, two ranks and their loader processes under one profiler, as many captures are made: docs/monitoring.md.

nsys profile --trace=nvtx,osrt --sample=none --cpuctxsw=none --output=capture \
    torchrun --nproc_per_node 2 examples/under_one_profiler.py
python -m hpcmm.analyze capture.qdstrm
"""

import time

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hpcmm import annotate
from hpcmm.annotate import collectives

STEPS, BATCH, SIDE, SLOW_READ_S = 60, 8, 64, 0.02
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 10**9,
}


class Images(Dataset):
    """Noise; the images of rank 1 lie on a slow disk."""

    def __init__(self, slow_s: float) -> None:
        self._slow_s = slow_s

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self._slow_s)
        return torch.from_numpy(np.random.default_rng(index).normal(size=(3, SIDE, SIDE)).astype(np.float32))


def main() -> None:
    deepspeed.init_distributed(auto_mpi_discovery=False)  # compiles an operator where none is in the cache
    collectives.install()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 31 * 31, 64), nn.Linear(64, 1)]
    model = nn.Sequential(*layers)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    images = Images(SLOW_READ_S if dist.get_rank() == 1 else 0.0)
    batches = iter(DataLoader(images, batch_size=BATCH, num_workers=1))
    for number in range(STEPS):
        with annotate.step(number):
            with annotate.phase("data"):
                batch = next(batches).to(engine.device)
            with annotate.phase("forward"):
                loss = engine(batch).square().mean()
            with annotate.phase("backward"):
                engine.backward(loss)
            with annotate.phase("optimizer"):
                engine.step()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
