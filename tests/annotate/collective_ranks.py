"""One of two gloo ranks that call every collective, from Python, from DistributedDataParallel and from DeepSpeed.

Prints, as JSON, how many ranges of each op were recorded in each group, and each group's own sequence number.
"""

import json
import os
import sys

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": sys.argv[1]}

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from hpcmm.annotate import collectives, expert_tokens, name_group
from hpcmm.config.schema import ClusterConfig
from hpcmm.node.cache import extensions_dir
from hpcmm.worker.compiled_ops import load_ops
from hpcmm.worker.distributed import leave_group

store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, is_master=sys.argv[1] == "0")
dist.init_process_group("gloo", store=store, rank=int(sys.argv[1]), world_size=2)
recorder = collectives.install(force=True)
assert recorder is not None
rank = dist.get_rank()

short, long = torch.ones(1000), torch.ones(2000)
for _ in range(20):
    dist.all_reduce(short)
    dist.all_reduce(short, async_op=True).wait()
dist.barrier()
dist.broadcast(short, 0)
dist.reduce(short, 0)
dist.all_gather([torch.empty(1000), torch.empty(1000)], short)
dist.all_gather_into_tensor(long, short)
dist.reduce_scatter_tensor(short, long)
dist.reduce_scatter_tensor(short, long, async_op=True).wait()
dist.all_to_all_single(long, long.clone())
dist.gather(short, [torch.empty(1000), torch.empty(1000)] if rank == 0 else None, 0)
dist.scatter(short, [torch.empty(1000), torch.empty(1000)] if rank == 0 else None, 0)
dist.all_gather_object([None, None], {"rank": rank})
dist.send(short, 1) if rank == 0 else dist.recv(short, 0)
pair = dist.new_group([0, 1])
name_group(pair, "tensor")
name_group(dist.new_group([1]), "not rank 0's")
dist.all_reduce(short, group=pair)

with torch.inference_mode():
    made = torch.ones(1000)
    dist.all_reduce(made)

# A group that is described as a DeviceMesh describes its own, and an exchange of unequal parts.
dist.all_reduce(short, group=dist.new_group([0, 1], group_desc="mesh_dp_shard"))
mine = 3 if rank == 0 else 1
dist.all_to_all_single(torch.empty(2 * mine), torch.ones(4), [mine, mine], [3, 1])
expert_tokens([5, 7], "layer 1")

# What compiled graphs, DTensor and tensor parallelism call; C++ code waits for the results.
gathered = functional.all_gather_tensor(short, 0, pair)
assert (functional.reduce_scatter_tensor(gathered, "sum", 0, pair) + functional.all_reduce(short, "sum", pair)).sum()

# Its reducer starts the all-reduce from C++, within the backward pass.
replicated = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(100, 100))
replicated(torch.ones(1, 100)).sum().backward()

load_ops(extensions_dir(ClusterConfig()))
import deepspeed  # noqa: E402 -- after its ops

deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
model = torch.nn.Linear(100, 100)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters()),
    config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
    dist_init_required=False,
)
for _ in range(3):
    engine.backward(engine(torch.ones(1, 100)).sum())
    engine.step()

groups = dist.distributed_c10d._world.pg_names
own_numbers = {name: group._get_sequence_number_for_group() for group, name in groups.items()}
recorded = {f"{group} {op}": count for (group, op), count in recorder.recorded.items()}
open_ranges = len(recorder._open)
engine.destroy()
print(json.dumps({"recorded": recorded, "own_numbers": own_numbers, "open_ranges": open_ranges}), flush=True)
leave_group()
