"""Two pipeline stages of two ranks, the second with more layers: ``pipeline.py gpipe|interleaved LAYERS LAYERS``."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B

from hpcmm import annotate

WIDTH, BATCHES = 512, 4

dist.init_process_group("gloo")
torch.set_num_threads(1)
mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
stage, chain = mesh.get_local_rank("pipeline"), mesh.get_group("pipeline")
chunks = 2 if sys.argv[1] == "interleaved" else 1
layers = int(sys.argv[2 + stage]) // chunks
models = [torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))) for _ in range(chunks)]
stages = [
    PipelineStage(model, stage + 2 * place, 2 * chunks, torch.device("cpu"), group=chain)
    for place, model in enumerate(models)
]
loss = torch.nn.functional.mse_loss
schedule = (
    ScheduleInterleaved1F1B(stages, BATCHES, loss_fn=loss)
    if chunks > 1
    else ScheduleGPipe(stages[0], BATCHES, loss_fn=loss)
)
parameters = [parameter for model in models for parameter in model.parameters()]
optimizer = torch.optim.SGD(parameters, lr=1e-4)
for _ in annotate.steps(range(16)):
    optimizer.zero_grad()
    data = torch.randn(256, WIDTH)
    schedule.step(data) if stage == 0 else schedule.step(target=data)
    for parameter in parameters:
        dist.all_reduce(parameter.grad, group=mesh.get_group("data"))
    optimizer.step()
dist.destroy_process_group()
