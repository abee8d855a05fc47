"""Plain DeepSpeed with ZeRO stage 2. It would be annotated without a change; the marked line says what a step is.

python -m hpcmm.launch profile=nsys -- examples/deepspeed_zero.py
"""

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from hpcmm import annotate

STEPS, MICRO_BATCH = 20, 8
CONFIG = {
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 10**9,
}

deepspeed.init_distributed(auto_mpi_discovery=False)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
torch.manual_seed(dist.get_rank())
batches = (torch.randn(MICRO_BATCH, 64, device=engine.device) for _ in range(STEPS))

for batch in annotate.steps(batches):  # the line for hpcmm
    loss = nn.functional.mse_loss(engine(batch), batch.sum(dim=1, keepdim=True))
    engine.backward(loss)
    engine.step()

if dist.get_rank() == 0:
    print(f"final loss {loss.item():.4f}")
engine.destroy()
dist.destroy_process_group()
