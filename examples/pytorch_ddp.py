"""Plain PyTorch with DistributedDataParallel. The one line for hpcmm is marked; without it the script runs the same.

python -m hpcmm.launch task=script task.path=examples/pytorch_ddp.py profile=nsys
torchrun --nproc-per-node=2 examples/pytorch_ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hpcmm import annotate

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--samples", type=int, default=1280)
arguments = parser.parse_args()

use_cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
dist.init_process_group("nccl" if use_cuda else "gloo")

torch.manual_seed(0)
inputs = torch.randn(arguments.samples, 64)
dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
loader = DataLoader(dataset, batch_size=16, sampler=DistributedSampler(dataset))
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1)).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)

for batch, target in annotate.steps(loader):  # the line for hpcmm
    loss = nn.functional.mse_loss(model(batch.to(device)), target.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

if dist.get_rank() == 0:
    print(f"lr {arguments.lr:g}, final loss {loss.item():.4f}")
dist.destroy_process_group()
