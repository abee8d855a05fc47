"""Data-parallel training in which some ranks work alone now and then: ``solo_work.py CASE``."""

import os
import sys
import time

import torch
import torch.distributed as dist

from hpcmm import annotate

CASE = sys.argv[1]

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, first_of_node = dist.get_rank(), os.environ["LOCAL_RANK"] == "0"
net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
model = torch.nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)


def evaluate() -> None:
    with torch.no_grad():
        for _ in range(200):
            net(torch.randn(256, 256))


for step in annotate.steps(range(31)):
    loss = model(torch.randn(256, 256)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if CASE == "rank_0" and rank == 0 and step % 7 == 6:
        evaluate()
    if CASE == "named" and rank == 3 and step in {8, 19}:
        with annotate.phase("evaluation"):
            evaluate()
    if CASE == "first_of_node" and first_of_node and step % 10 == 9:
        evaluate()
    if CASE == "broadcast" and step % 10 == 9:
        if rank == 0:
            evaluate()
        dist.broadcast(torch.ones(1), 0)
    if CASE == "stall" and rank == 2 and step in {11, 18}:
        time.sleep(1.0)
dist.destroy_process_group()
