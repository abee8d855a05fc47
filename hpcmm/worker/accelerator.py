"""The choice between GPU and CPU, made once and before DeepSpeed is imported, which makes its own at import."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

DEVICES = Path("/dev")


def select_accelerator() -> str:
    """``cuda`` where this process sees a GPU that works, else ``cpu``; DeepSpeed is told through DS_ACCELERATOR.

    A scheduler may set CUDA_VISIBLE_DEVICES on nodes whose GPUs PyTorch cannot drive, so PyTorch is asked.
    """
    if not any(DEVICES.glob("nvidia[0-9]*")):
        # PyTorch complains of the driver's library, which nsys brings along on machines without a GPU.
        warnings.filterwarnings("ignore", message="CUDA initialization", category=UserWarning)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = accelerator
    return accelerator
