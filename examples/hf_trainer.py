"""A Hugging Face Trainer over a tiny, randomly initialised GPT-2.

It would be annotated without a change; the marked line says what a step is.

python -m hpcmm.launch profile=nsys -- examples/hf_trainer.py
"""

import tempfile

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hpcmm.annotate.hf import StepAnnotation

VOCABULARY, LENGTH, STEPS = 64, 16, 10


class Counting(Dataset):
    """Sequences that count upwards from a number of their own."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(LENGTH) + index) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2))
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=Counting(),
        callbacks=[StepAnnotation()],  # the line for hpcmm
    )
    result = trainer.train()
if dist.get_rank() == 0:
    print(f"mean loss {result.training_loss:.4f}")
dist.destroy_process_group()
