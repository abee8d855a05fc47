"""Many small collectives a step, or the gathers of FSDP: ``messages.py small|sharded``."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from hpcmm import annotate

dist.init_process_group("gloo")
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))
if sys.argv[1] == "sharded":
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in annotate.steps(range(12)):
    with annotate.phase("forward"):
        loss = model(torch.randn(32, 512)).mean()
    with annotate.phase("backward"):
        loss.backward()
    with annotate.phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    if sys.argv[1] == "small":
        for _ in range(60):
            dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
