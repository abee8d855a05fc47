"""fp8 trains as bf16 does, within what 8 bits round off, in each recipe that takes it; what cannot is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cut_cases import Case, Found, config_of
from cut_model import TinyTraining
from emulated_fp8 import CORE, CPU, IS_INSTALLED, RANKS, REST, check_cases, on_ranks
from real_ranks import run_ranks

from hpcmm.config.mesh import DATA, PIPELINE
from hpcmm.config.schema import RunConfig
from hpcmm.config.workload import Workload
from hpcmm.errors import HpcmmError
from hpcmm.train.loop import _built
from hpcmm.train.precision import multiply_in_fp8
from hpcmm.worker.environment import RankEnvironment

pytestmark = pytest.mark.timeout(400)
FP8 = 1e-2
"""Of a loss and of a weight, from those of one process in float32."""
OF_BF16 = 3e-2
"""Of a loss, relative, from that in bf16; each step of the five changes it by far more in all."""
H100 = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, compiled_ops: None) -> Callable[..., Any]:
    """A function on the ranks; what rank 0 returns."""
    if not IS_INSTALLED:
        pytest.skip("torchao is not installed: run scripts/setup.sh")
    folder = str(tmp_path_factory.mktemp("runs"))
    return lambda function, *arguments: run_ranks(RANKS, function, *arguments, folder, timeout_s=280)[0]


@pytest.fixture(scope="module")
def found(run: Callable[..., Any]) -> dict[str, Any]:
    return run(on_ranks)


def is_near_one_process(case: Case, found: Found) -> None:
    assert not found.wrong_names
    assert found.loss < FP8
    assert found.weight < FP8
    if case.resume:
        assert found.resumed == 0
        assert found.started == 0  # without fp8


def test_losses_and_weights_are_near_those_of_one_process_and_a_run_goes_on(found: dict[str, Any]):
    for case, of_case in zip(CORE, found["cases"], strict=True):
        is_near_one_process(case, of_case)


@pytest.mark.long
def test_so_they_are_in_each_other_form_of_a_recipe(run: Callable[..., Any]):
    for case, of_case in zip(REST, run(check_cases, REST), strict=True):
        is_near_one_process(case, of_case)


def test_a_tiny_omni_modal_model_learns_as_in_bf16(found):
    (bf16, names), (fp8, own_names) = found["omni"]
    assert names == own_names
    assert bf16[-1] < 0.8 * bf16[0]
    assert fp8 != bf16
    assert fp8 == pytest.approx(bf16, rel=OF_BF16)


def test_the_trained_maps_of_the_layers_multiply_in_fp8_under_their_own_names(found):
    llama, mixtral = found["maps"]["llama"], found["maps"]["mixtral"]
    assert llama["same"]
    assert mixtral["same"]
    layer = "trunk.lm.model.layers.{}"
    attention = [f"{layer}.self_attn.{each}_proj" for each in "qkvo"]
    with_lora = [f"{each}.base_layer" if each[-6] in "qvo" else each for each in attention]
    network = [f"{layer}.mlp.{each}" for each in ("gate_proj", "up_proj.base_layer", "down_proj.base_layer")]
    first = [each.format(0) for each in (*with_lora, *network)]
    assert llama["converted"] == [*first, *(each.format(1) for each in with_lora)], "those of layer 1 are frozen"
    assert mixtral["converted"] == [each.format(number) for number in (0, 1) for each in attention]
    assert [llama["count"], mixtral["count"]] == [11, 8]


def test_zero_3_lets_go_of_weights_between_the_passes(found):
    assert found["kept"] == (0, 14)


class Chain(Workload):
    def axes(self, _config: RunConfig) -> frozenset[str]:
        return frozenset({DATA, PIPELINE})

    def training_class(self) -> type[TinyTraining]:
        return TinyTraining


def test_a_rank_on_a_processor_refuses_fp8_before_the_engine():
    rank_env = RankEnvironment(0, 0, 1, 1, "0", "here", "127.0.0.1", 1)
    with pytest.raises(HpcmmError, match="is fp8, which needs a GPU, and this rank trains on the processor: choose"):
        _built(TinyTraining("llama"), Chain(), config_of(Case("llama", {}, precision="fp8"), 1), rank_env, CPU)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A30")


def in_fp8(training: TinyTraining) -> None:
    multiply_in_fp8(training, config_of(Case("llama", {}, precision="fp8"), 1), H100)


def test_a_gpu_that_does_not_multiply_in_fp8_is_named(gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    needs = r"takes a GPU of compute capability 8\.9 or later, and this rank's NVIDIA A30 has 8\.0: set parallel\.prec"
    with pytest.raises(HpcmmError, match=needs):
        in_fp8(TinyTraining("llama"))


def test_a_rank_without_torchao_says_how_to_install_it(gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(HpcmmError, match=r"install it there by `pip install 'torchao>=0\.16'`, or set parallel"):
        in_fp8(TinyTraining("llama"))


def test_a_model_without_a_map_for_fp8_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch):
    without = TinyTraining("llama")
    monkeypatch.setattr(without, "structure", lambda: None)
    for training in (TinyTraining("llama", "lora"), without):
        with pytest.raises(HpcmmError, match="no language model in whose layers a linear map trains whose widths 16"):
            in_fp8(training)
