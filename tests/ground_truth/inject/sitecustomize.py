"""Puts faults into a rank from outside its code. Python imports this at start-up if its folder is on PYTHONPATH.

``HPCMM_GROUND_TRUTH`` holds a JSON list of faults, each ``{"at": WHERE, "do": WHAT, "ranks": [..], ...}``:

- ``at``: ``data``, ``fetch`` (in the process that loads), ``forward``, ``backward``, ``optimizer``, ``checkpoint``,
  ``save`` (``torch.save``, within a checkpoint), ``between`` (after a step) or ``batch``;
- ``do``: ``burn`` (CPU time), ``sleep``, ``wait`` (for a child process), ``lock`` (wait for another thread), ``write``
  (to the disk, for good), ``enlarge`` (the batch by ``factor``, or one of several drawn anew each step);
- ``ranks``: the ranks; absent for all. ``node``: all ranks of that node. ``chance``: of each rank in each step;
- ``every``: only in each n-th step; ``first``, ``last``: only in these steps.
"""

import importlib.abc
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time

FAULTS = json.loads(os.environ.get("HPCMM_GROUND_TRUTH", "[]"))
RANK = int(os.environ.get("SLURM_PROCID", "-1"))
NODE = os.environ.get("SLURMD_NODENAME", "")


class Injector:
    def __init__(self, faults):
        self.faults = faults
        self.step = 0
        self.dice = random.Random(RANK)  # noqa: S311 -- no secret

    def due(self, at):
        return [fault for fault in self.faults if fault["at"] == at and self.meant(fault)]

    def meant(self, fault):
        mine = RANK in fault["ranks"] if "ranks" in fault else fault["node"] == NODE if "node" in fault else True
        within = fault.get("first", 0) <= self.step <= fault.get("last", sys.maxsize)
        return (
            mine and within and self.step % fault.get("every", 1) == 0 and self.dice.random() < fault.get("chance", 1)
        )

    def act(self, at):
        for fault in self.due(at):
            seconds = fault.get("seconds", 0.0)
            if fault["do"] == "burn":
                until = time.thread_time() + seconds
                while time.thread_time() < until:
                    pass
            elif fault["do"] == "sleep":
                time.sleep(seconds)
            elif fault["do"] == "wait":
                subprocess.run(["sleep", str(seconds)], check=True)
            elif fault["do"] == "lock":
                threading.Event().wait(seconds)
            elif fault["do"] == "write":
                write_for(seconds)

    def before(self, owner, method, at):
        original = getattr(owner, method)

        def with_fault(this, *arguments, **keywords):
            self.act(at)
            return original(this, *arguments, **keywords)

        setattr(owner, method, with_fault)

    def enlarged(self, batch):
        for fault in self.due("batch"):
            factor = self.dice.choice(fault["factor"]) if isinstance(fault["factor"], list) else fault["factor"]
            batch = {key: _repeated(value, factor) for key, value in batch.items()}
        return batch


def write_for(seconds):
    until = time.monotonic() + seconds
    with tempfile.TemporaryFile() as file:
        while time.monotonic() < until:
            file.seek(0)
            file.write(bytes(4_000_000))
            file.flush()
            os.fsync(file.fileno())


def _repeated(value, factor):
    return value * factor if isinstance(value, list) else value.repeat(factor, *[1] * (value.dim() - 1))


def into_engine(injector, module):
    engine = module.DeepSpeedEngine
    injector.before(engine, "forward", "forward")
    injector.before(engine, "backward", "backward")
    injector.before(engine, "save_checkpoint", "checkpoint")
    step = engine.step

    def step_with_fault(this, *arguments, **keywords):
        injector.act("optimizer")
        result = step(this, *arguments, **keywords)
        injector.step += 1
        return result

    engine.step = step_with_fault


def into_loader(injector, module):
    iterator = module._BaseDataLoaderIter
    following = iterator.__next__

    def next_with_fault(this):
        batch = following(this)
        injector.act("data")
        return injector.enlarged(batch)

    iterator.__next__ = next_with_fault


def into_fetcher(injector, module):
    injector.before(module._MapDatasetFetcher, "fetch", "fetch")


def into_metrics(injector, module):
    injector.before(module.MetricsWriter, "step", "between")


def into_torch_save(injector, module):
    save = module.save

    def save_with_fault(*arguments, **keywords):
        injector.act("save")
        return save(*arguments, **keywords)

    module.save = save_with_fault


HOOKS = {
    "deepspeed.runtime.engine": into_engine,
    "torch.utils.data.dataloader": into_loader,
    "torch.utils.data._utils.fetch": into_fetcher,
    "hpcmm.runs.metrics": into_metrics,
    "torch": into_torch_save,
}


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs a hook right after its module has been imported."""

    def __init__(self, injector):
        self.injector = injector
        self.waiting = dict(HOOKS)

    def find_spec(self, name, _path, _target=None):
        hook = self.waiting.pop(name, None)
        if hook is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_hook(module):
            execute(module)
            hook(self.injector, module)

        spec.loader.exec_module = execute_and_hook
        return spec


if FAULTS and RANK >= 0:
    sys.meta_path.insert(0, AfterImport(Injector(FAULTS)))
