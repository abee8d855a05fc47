"""Data-parallel training in which one rank loads longer: ``loading.py RANK SECONDS``; no rank with -1."""

import sys
import time

import torch
import torch.distributed as dist

from hpcmm import annotate

SLOW_RANK, SECONDS = int(sys.argv[1]), float(sys.argv[2])
WIDTH = 1024

dist.init_process_group("gloo")
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH))
model = torch.nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)


def load() -> torch.Tensor:
    if dist.get_rank() == SLOW_RANK:
        time.sleep(SECONDS)
    return torch.randn(64, WIDTH)


for _ in annotate.steps(range(16)):
    with annotate.phase("data"):
        batch = load()
    with annotate.phase("forward"):
        loss = model(batch).square().mean()
    with annotate.phase("backward"):
        loss.backward()
    with annotate.phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
dist.destroy_process_group()
