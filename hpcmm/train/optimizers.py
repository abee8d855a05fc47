"""The optimizer that ``optimizer=NAME`` chooses, with the rates of ``train``; and LAMB, which no library here has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcmm.config.parts import TARGET, build_part, cannot_be_made, import_class, own_folders, resolved_part
from hpcmm.config.schema import OPTIMIZER, RunConfig


def build_optimizer(config: RunConfig, model: nn.Module, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of ``config.optimizer`` over ``groups`` of parameters of ``model``.

    A class that has a static method ``see_model`` is shown the model first. The optimizer gets ``train.learning_rate``,
    ``weight_decay`` and ``betas``, as far as its class has such parameters and its YAML file gives no others. Raises
    HpcmmError if the class cannot be imported, or refuses its parameters.
    """
    train, part = config.train, resolved_part(config.optimizer, OPTIMIZER.group, own_folders())
    given: dict[str, Any] = {}
    if isinstance(part, Mapping):
        found = import_class(str(part[TARGET]))
        if (see_model := getattr(found, "see_model", None)) is not None:
            see_model(model)
        taken = inspect.signature(found).parameters
        rates = {"lr": train.learning_rate, "betas": tuple(train.betas), "weight_decay": train.weight_decay}
        given = {name: value for name, value in rates.items() if name in taken and name not in part}
    try:
        built = build_part(part, OPTIMIZER, params=groups, **given)
    except ImportError as error:  # of a package that only this optimizer needs
        raise cannot_be_made(part, OPTIMIZER, error) from error
    assert isinstance(built, torch.optim.Optimizer)
    return built


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam's step, with the weights' decay, scaled to the norm of each parameter.

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020, algorithm 2, with
    phi(z) = z. A parameter or a step of norm 0 is not scaled.
    """

    whole_parameters = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        """Raises ValueError for values that no step can be made with."""
        if not lr >= 0 or not eps > 0 or not weight_decay >= 0:
            raise ValueError(f"lr={lr}, eps={eps} and weight_decay={weight_decay} must not be negative, and eps not 0.")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be two numbers from 0 to below 1.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step with the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        corrected = mean / (1 - beta1 ** state["step"])
        update = corrected / ((square / (1 - beta2 ** state["step"])).sqrt_() + group["eps"])
        update.add_(parameter, alpha=group["weight_decay"])
        weight_norm, update_norm = parameter.norm(), update.norm()
        # On the device, so that no step waits for it.
        is_scaled = (weight_norm > 0) & (update_norm > 0)
        ratio = torch.where(is_scaled, weight_norm / update_norm, torch.ones_like(weight_norm))
        parameter.sub_(update * (ratio * group["lr"]))
