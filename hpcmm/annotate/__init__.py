"""NVTX ranges for training steps, their phases and every collective; usable from any PyTorch script.

>>> from hpcmm import annotate
>>> from hpcmm.annotate import collectives
>>> collectives.install()      # once, after torch.distributed.init_process_group
>>> with annotate.step(0):
...     with annotate.phase("data"):
...         ...

In a loop of your own one line annotates the steps: ``for batch in annotate.steps(loader):``. A Hugging Face ``Trainer``
takes ``hpcmm.annotate.hf.StepAnnotation`` as a callback.

Without a profiler attached nothing is installed and the context managers do nothing.
"""

from hpcmm.annotate.ranges import phase, profiler_attached, step, steps

__all__ = ["phase", "profiler_attached", "step", "steps"]
