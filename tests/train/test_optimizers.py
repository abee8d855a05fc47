"""The optimizer of a run gets what train and its own YAML file say; LAMB is that of its paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.train.optimizers import Lamb, build_optimizer


def built(*overrides: str) -> torch.optim.Optimizer:
    model = nn.Linear(2, 1)
    return build_optimizer(compose_run(overrides), model, [{"params": [*model.parameters()]}])


def test_the_default_is_adamw_with_the_rates_of_train():
    optimizer = built("train.learning_rate=0.3", "train.betas=[0.5,0.6]", "train.weight_decay=0.2")
    model = nn.Linear(2, 1)
    by_hand = torch.optim.AdamW(model.parameters(), lr=0.3, betas=(0.5, 0.6), weight_decay=0.2)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults == by_hand.defaults


def test_an_optimizer_gets_those_rates_that_it_has_and_its_yaml_file_comes_first():
    optimizer = built("optimizer=sgd", "train.learning_rate=0.3", "train.weight_decay=0.2")
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"], optimizer.defaults["momentum"]) == (
        *(0.3, 0.2),
        0.9,
    )
    assert built("optimizer=lamb", "optimizer.lr=0.7", "train.learning_rate=0.3").defaults["lr"] == 0.7


def test_a_value_that_the_class_refuses_is_a_sentence():
    with pytest.raises(HpcmmError, match=r"optimizer=sgd cannot be made: Invalid momentum value: -1"):
        built("optimizer=sgd", "optimizer.momentum=-1")
    with pytest.raises(HpcmmError, match="optimizer=lamb cannot be made: lr="):
        built("optimizer=lamb", "optimizer.eps=0")


def test_lamb_makes_the_steps_of_its_paper():
    rate, decay, (beta1, beta2), eps = 0.1, 0.05, (0.8, 0.9), 1e-6
    weight = np.array([[0.5, -1.0], [2.0, 0.25]])
    parameter = nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = Lamb([parameter], lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 4):
        gradient = np.array([[1.0, -2.0], [0.5, step]])
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        ratio = (mean / (1 - beta1**step)) / (np.sqrt(square / (1 - beta2**step)) + eps) + decay * weight
        weight = weight - rate * np.linalg.norm(weight) / np.linalg.norm(ratio) * ratio
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-12)


def test_lamb_does_not_scale_the_step_of_a_parameter_that_is_zero():
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parameter.grad = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    Lamb([parameter], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(
        parameter.detach(), torch.tensor([-0.1, 0.1, -0.1], dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_lamb_goes_on_from_its_saved_state_bit_for_bit():
    def after(steps: int, saved_at: int | None) -> torch.Tensor:
        parameter = nn.Parameter(torch.arange(1.0, 5.0))
        optimizer = Lamb([parameter], lr=0.1)
        for step in range(steps):
            if step == saved_at:
                state = optimizer.state_dict()
                optimizer = Lamb([parameter], lr=0.1)
                optimizer.load_state_dict(state)
            parameter.grad = torch.sin(parameter.detach() + step)
            optimizer.step()
        return parameter.detach()

    assert torch.equal(after(4, saved_at=2), after(4, saved_at=None))
