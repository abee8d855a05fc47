"""Plain PyTorch with DistributedDataParallel. It knows nothing of hpcmm.

python -m hpcmm.launch profile=nsys -- examples/pytorch_ddp.py --slow-rank 1
torchrun --nproc-per-node=2 examples/pytorch_ddp.py
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_collate

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--samples", type=int, default=1280)
parser.add_argument("--slow-rank", type=int, help="loading a batch takes this rank 50 ms longer, to see it named")
arguments = parser.parse_args()

use_cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
dist.init_process_group("nccl" if use_cuda else "gloo")


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """A batch, late on the slow rank."""
    if dist.get_rank() == arguments.slow_rank:
        time.sleep(0.05)
    return default_collate(samples)


torch.manual_seed(0)
inputs = torch.randn(arguments.samples, 64)
dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
loader = DataLoader(dataset, batch_size=16, sampler=DistributedSampler(dataset), collate_fn=collate)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1)).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)

for batch, target in loader:
    loss = nn.functional.mse_loss(model(batch.to(device)), target.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

if dist.get_rank() == 0:
    print(f"lr {arguments.lr:g}, final loss {loss.item():.4f}")
dist.destroy_process_group()
