"""Experts on each rank, and a router that prefers those of one of them: ``experts.py RANK SHARE``.

``SHARE``: of all tokens, those that go to the experts of ``RANK``; the others get as many as one another.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd

from hpcmm import annotate

TOKENS, WIDTH, INNER = 256, 256, 2048

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, ranks = dist.get_rank(), dist.get_world_size()
preferred, share = int(sys.argv[1]), float(sys.argv[2])
experts = dist.new_group(range(ranks))
annotate.name_group(experts, "expert")
dense = torch.nn.Linear(WIDTH, WIDTH)
expert = torch.nn.Sequential(torch.nn.Linear(WIDTH, INNER), torch.nn.GELU(), torch.nn.Linear(INNER, WIDTH))
parameters = [*dense.parameters(), *expert.parameters()]
optimizer = torch.optim.SGD(parameters, lr=1e-4)
rest = round(TOKENS * (1 - share) / (ranks - 1))
to_each = [TOKENS - rest * (ranks - 1) if each == preferred else rest for each in range(ranks)]


def exchanged(tokens: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    return all_to_all_single_autograd(tokens, received, sent, experts)


for _ in annotate.steps(range(16)):
    optimizer.zero_grad()
    with annotate.phase("forward"):
        hidden = dense(torch.randn(TOKENS, WIDTH))
        received = [to_each[rank]] * ranks
        tokens = exchanged(hidden, to_each, received)
        back = exchanged(expert(tokens), received, to_each)
        loss = (hidden + back).square().mean()
    with annotate.phase("backward"):
        loss.backward()
    with annotate.phase("optimizer"):
        for parameter in dense.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
dist.destroy_process_group()
