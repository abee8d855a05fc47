"""Which optimizers a run may have is told on the login node, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config import class_source
from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError

OWN = """\
from torch.optim import SGD, Optimizer


class Plain(Optimizer):
    def __init__(self, params, lr: float, warmth: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})


class Normed(SGD):
    whole_parameters = True
"""


def problem(*overrides: str) -> str:
    with pytest.raises(HpcmmError) as refused:
        validate(compose_run(overrides))
    return str(refused.value)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_optimizers.py").write_text(OWN)
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    for name in ("Plain", "Normed"):
        file = tmp_path / "conf" / "optimizer" / f"{name.lower()}.yaml"
        file.write_text(f"_target_: own_optimizers.{name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"launch.config_dir={tmp_path / 'conf'}"


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "muon"])
def test_each_optimizer_of_hpcmm_fits_plain_data_parallelism(name):
    validate(compose_run([f"optimizer={name}", "parallel.zero_stage=0"]))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer=lamb"], "optimizer=lamb needs each parameter whole, and ZeRO stage 2 gives a rank pieces"),
        (["optimizer=muon", "parallel.zero_stage=1"], "set parallel.zero_stage=0, or choose optimizer=adamw"),
        (["optimizer._target_=torch.optim.Adafactor"], "optimizer=Adafactor needs each parameter whole"),
        (["optimizer._target_=torch.optim.LBFGS"], "evaluates the loss several times a step"),
        (["optimizer._target_=torch.optim.Adamm"], "there is no such class"),
        (["optimizer._target_=no_such_package.optim.Adam"], "there is no package no_such_package: install it"),
        (["optimizer._target_=torch.nn.Linear"], "is not a Optimizer"),
        (["optimizer=sgd", "optimizer.momentun=0.8"], "not a parameter of SGD; its parameters: lr, momentum"),
        (["optimizer=sgd", "optimizer.nesterov=much"], "optimizer.nesterov is 'much', but SGD takes bool"),
        (["optimizer=sgd", "optimizer.params=[]"], "cannot be given: the workload sets it"),
        (["optimizer=adamw_8bit", "cluster=local"], "runs on GPUs alone, and cluster.gpus_per_node is 0"),
    ],
)
def test_one_that_does_not_fit_is_a_sentence(overrides, expected):
    assert expected in problem(*overrides)


@pytest.mark.skipif(class_source.source_file("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_one_of_a_package_that_is_not_installed_names_the_package():
    assert "bitsandbytes" in problem("optimizer=adamw_8bit", "cluster=a30")


def test_a_users_own_is_one_class_and_one_yaml_file(own):
    validate(compose_run([own, "optimizer=plain", "optimizer.warmth=0.1"]))
    assert "not a parameter of Plain" in problem(own, "optimizer=plain", "optimizer.cold=1")
    assert "optimizer=normed needs each parameter whole" in problem(own, "optimizer=normed")


def test_a_login_node_without_torch_leaves_the_check_to_the_ranks(monkeypatch, own):
    found = class_source._spec
    monkeypatch.setattr(class_source, "_spec", lambda name: None if name.startswith("torch") else found(name))
    validate(compose_run(["optimizer=sgd", "optimizer.momentum=0.5"]))
    validate(compose_run([own, "optimizer=plain"]))


def test_to_check_it_imports_no_torch():
    code = (
        "import sys; from hpcmm.config.compose import compose_run; from hpcmm.config.validate import validate; "
        "validate(compose_run(['optimizer=sgd', 'optimizer.momentum=0.5'])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
