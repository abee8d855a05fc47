"""Steps and phases that frameworks tell by their callbacks."""

import sys
from types import SimpleNamespace

import pytest

from hpcmm.annotate import callbacks, ranges


@pytest.fixture
def said(monkeypatch):
    """What NVTX was told."""
    told = []
    monkeypatch.setattr(ranges, "_ATTACHED", True)
    monkeypatch.setattr(ranges, "_automatic", None)
    monkeypatch.setattr(ranges, "tell_rank", lambda: None)
    monkeypatch.setattr(ranges, "push", lambda it: told.append(it.name if it.payload is None else f"step{it.payload}"))
    monkeypatch.setattr(ranges, "pop", lambda: told.append("end"))
    return told


def test_a_lightning_step_is_all_micro_batches_of_one_update(said, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=object))
    callbacks._lightning_steps.cache_clear()
    steps, trainer = callbacks.LightningSteps(), SimpleNamespace(global_step=4)
    for is_last in (False, True):
        steps.on_train_batch_start(trainer, None, None, 0)
        steps.on_before_backward(trainer, None, None)
        steps.on_after_backward(trainer, None)
        if is_last:
            steps.on_before_optimizer_step(trainer, None, None)
            trainer.global_step += 1
        steps.on_train_batch_end(trainer, None, None, None, 0)
    callbacks._lightning_steps.cache_clear()
    batch = ["forward", "end", "backward", "end"]
    assert said == ["step4", *batch, *batch, "optimizer", "end", "end"]


def test_a_step_of_fabric_ends_with_the_last_of_its_optimizers(said):
    steps = callbacks.FabricSteps(optimizers=2)
    steps.on_after_setup(fabric=None, module=None)
    for _ in range(4):
        steps.on_after_optimizer_step(strategy=None, optimizer=None)
    steps.on_train_end()
    assert said == ["step0", "end", "step1", "end", "step2", "end"]


def test_a_step_of_accelerate_ends_when_it_has_changed_the_weights(said):
    accelerator = SimpleNamespace(sync_gradients=False)
    for number, _ in enumerate(callbacks.accelerate_steps(accelerator, "abcd", first=3)):
        accelerator.sync_gradients = number % 2 == 1
    fetch = ["data", "end"]
    assert said == ["step3", *fetch, *fetch, "end", "step4", *fetch, *fetch, "end"]


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    callbacks._lightning_steps.cache_clear()
    for name in ("lightning.pytorch", "lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="install one of them"):
        callbacks.LightningSteps  # noqa: B018
