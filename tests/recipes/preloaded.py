"""What the server imports from which ranks are forked. No thread may be left running by it."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import deepspeed  # noqa: F401
import torch
import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import hpcmm.train.loop  # noqa: F401
from hpcmm.config.schema import ClusterConfig
from hpcmm.node.cache import extensions_dir
from hpcmm.worker.compiled_ops import load_ops

torch.set_num_threads(1)
load_ops(extensions_dir(ClusterConfig(name="test")))
