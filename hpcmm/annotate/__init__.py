"""NVTX ranges for training steps, their phases and every collective; usable from any PyTorch script.

>>> from hpcmm import annotate
>>> from hpcmm.annotate import collectives
>>> collectives.install()      # once, after torch.distributed.init_process_group
>>> with annotate.step(0):
...     with annotate.phase("data"):
...         ...

In a loop of your own one line annotates the steps: ``for batch in annotate.steps(loader):``. A Hugging Face ``Trainer``
takes ``hpcmm.annotate.hf.StepAnnotation`` as a callback.

In a run of hpcmm's that is profiled, steps, phases and collectives are found without any of this
(:mod:`hpcmm.annotate.auto_instrument`); what a script names itself goes first. Lightning, Fabric and accelerate have
callbacks in :mod:`hpcmm.annotate.callbacks`. Without a profiler attached nothing is installed and the context managers
do nothing.

``annotate.name_group(group, "tensor")`` tells what a process group is for, and ``annotate.expert_tokens(counts)`` how
many tokens the experts of this rank got (:mod:`hpcmm.annotate.groups`).

``annotate.should_stop()`` and ``annotate.stopped()`` let a script save a checkpoint when its job is about to end, and
go on from there: see :mod:`hpcmm.annotate.stopping`. Without a profiler the standard library is enough for all this.
"""

from hpcmm.annotate.groups import expert_tokens, name_group
from hpcmm.annotate.ranges import phase, profiler_attached, step, steps
from hpcmm.annotate.stopping import should_stop, stopped

__all__ = ["expert_tokens", "name_group", "phase", "profiler_attached", "should_stop", "step", "steps", "stopped"]
