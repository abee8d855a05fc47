"""A model whose linear maps, experts or encoders are shared between ranks trains as in one process.

Four processes train all cases, one after another, with SGD, for Adam hides wrong scales of gradients.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cut_cases import Case, Found, check
from cut_model import TinyTraining
from real_ranks import run_ranks

from hpcmm.config.mesh import Mesh
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.train.recipes import build
from hpcmm.train.recipes.encoders import shares
from hpcmm.train.recipes.experts import expert_groups, expert_settings
from hpcmm.train.recipes.tensor import _planned
from hpcmm.workloads.causal_lm import add_lora

RANKS = 4
FP32, BF16 = 2e-5, 5e-3

CORE = [
    Case("llama", {"tensor": 4}, 0, clip=0.5, resume=True),
    Case("qwen3", {"tensor": 2}, 3, "all and lora", clip=0.5, encoders="replicated", resume=True),
    Case("llama", {"tensor": 2}, 1, "frozen", precision="bf16"),
    Case("llama", {"sequence": 2}, 2, encoders="replicated", clip=0.5),
    Case("mixtral", {"expert": 2}, 2, "aux", clip=0.05, resume=True),
    Case("mixtral", {"expert": 2, "tensor": 2}, 1, clip=0.05, encoders="replicated", resume=True),
]
"""One of each kind."""
REST = [
    Case("tied", {"tensor": 2}, 2, checkpointing=True, rounds=2, resume=True),
    Case("qwen2", {"tensor": 2}, 1, "lora", clip=0.5, encoders="replicated"),
    Case("llama", {}, 3, encoders="replicated", clip=0.5),
    Case("qwen3_moe", {"expert": 4}, 3, rounds=2, resume=True),
    Case("mixtral", {"expert": 2}, 1, "lora", checkpointing=True, resume=True),
    Case("qwen3_moe", {"expert": 2, "tensor": 2}, 0, resume=True),
]


class Outcomes:
    """What became of the cases, which run with the others of their list when one of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: Outcomes = {}

    def __getitem__(self, case: Case) -> Found:
        if str(case) not in self._found:
            cases = CORE if case in CORE else REST
            outcomes = run_ranks(RANKS, check, cases, str(self._folder), timeout_s=240)[0]
            self._found |= dict(zip(map(str, cases), outcomes, strict=True))
        return self._found[str(case)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("runs"))


CASES = [*CORE, *(pytest.param(case, marks=pytest.mark.long) for case in REST)]
RESUMED = [
    *(case for case in CORE if case.resume),
    *(pytest.param(case, marks=pytest.mark.long) for case in REST if case.resume),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_norms_and_whole_weights_are_those_of_one_process(case: Case, found: Outcomes):
    of_case = found[case]
    tolerance = FP32 if case.precision == "fp32" else BF16
    assert not of_case.wrong_names
    assert of_case.loss < tolerance
    assert of_case.norm < 10 * tolerance
    assert of_case.weight < tolerance


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_a_run_goes_on_from_a_checkpoint_and_another_starts_from_it(case: Case, found: Outcomes):
    assert found[case].resumed == 0
    assert found[case].started == 0


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_no_two_ranks_write_one_file_of_a_checkpoint(case: Case, found: Outcomes):
    assert found[case].written_twice == ()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_weights_that_no_rank_has_cut_are_saved_without_a_message_each(case: Case, found: Outcomes):
    in_parts = case.precision != "fp32" and case.zero in {1, 2}
    assert bool(found[case].sums) == in_parts


def test_ranks_that_divide_a_model_encode_a_share_each(found: Outcomes):
    shared = Case("mixtral", {"expert": 2, "tensor": 2}, 1, clip=0.05, encoders="replicated", resume=True)
    whole = Case("llama", {"tensor": 4}, 0, clip=0.5, resume=True)
    assert found[shared].seen < found[whole].seen


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1, 1, 1, 1], [range(0, 2), range(2, 4)]),
        ([9, 1, 1, 1], [range(0, 1), range(1, 4)]),
        ([5], [range(0, 0), range(0, 1)]),
        ([], [range(0, 0), range(0, 0)]),
    ],
)
def test_neighbouring_things_are_shared_by_their_sizes(sizes: list[int], expected: list[range]):
    assert shares(sizes, 2) == expected


def test_what_is_cut_is_what_the_architecture_says_within_the_network_alone():
    model = TinyTraining("qwen3").model
    planned = dict(_planned(model.trunk.lm))
    assert planned["model.layers.1.self_attn.q_proj"] == "colwise"
    assert planned["model.layers.0.mlp.down_proj"] == "rowwise"
    assert not any("lm_head" in name or "embed" in name for name in planned)


def test_an_architecture_without_a_plan_is_refused():
    network = TinyTraining("llama").model.trunk.lm
    network.config.base_model_tp_plan = None
    with pytest.raises(HpcmmError, match=r"leave parallel\.mesh\.tensor out"):
        list(_planned(network))


def test_a_style_of_cutting_that_is_not_known_is_refused():
    network = TinyTraining("llama").model.trunk.lm
    network.config.base_model_tp_plan = {"layers.*.mlp.up_proj": "diagonal"}
    with pytest.raises(HpcmmError, match="'diagonal', which is not supported"):
        list(_planned(network))


def test_a_model_of_which_nothing_trains_is_refused():
    training = TinyTraining("llama")
    training.model.requires_grad_(False)
    with pytest.raises(HpcmmError, match="Nothing of the model trains, for all its parameters are frozen: let one"):
        build(training, RunConfig(), Mesh(), 0)


def test_a_network_without_experts_or_with_jitter_is_refused():
    with pytest.raises(HpcmmError, match="does not know the experts of a llama"):
        expert_settings(TinyTraining("llama").model.trunk.lm, "trunk.lm", 2)
    noisy = TinyTraining("mixtral").model.trunk.lm
    noisy.config.router_jitter_noise = 0.1
    with pytest.raises(HpcmmError, match="router_jitter_noise, which DeepSpeed's AutoEP leaves out"):
        expert_settings(noisy, "trunk.lm", 2)


def test_a_router_with_lora_is_refused_for_experts_that_are_divided():
    network = TinyTraining("mixtral").model.trunk.lm
    add_lora(network, 2, 16.0, 0.0, ["q_proj"], "targets")
    expert_settings(network, "trunk.lm", 2)
    network = TinyTraining("mixtral").model.trunk.lm
    add_lora(network, 2, 16.0, 0.0, ["q_proj", "gate"], "targets")
    with pytest.raises(HpcmmError, match=r"model\.layers\.0\.mlp\.gate has LoRA, which DeepSpeed's AutoEP leaves out"):
        expert_settings(network, "trunk.lm", 2)


def test_experts_have_an_optimizer_group_of_their_own_with_the_values_of_theirs():
    model = TinyTraining("mixtral").model
    parameters = list(model.parameters())
    groups = expert_groups([{"params": parameters, "lr": 0.1}], model.trunk.lm, 2)
    assert [group.get("moe", False) for group in groups] == [False, True]
    assert all(group["lr"] == 0.1 for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    assert all(isinstance(each, torch.nn.Parameter) and each.dim() == 3 for each in groups[1]["params"])
