"""A run's trained model: one that its workload builds, with the weights of the run's newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.checkpoint import read_trained

Model = TypeVar("Model", bound=nn.Module)


def load_model(run: RunDir, build: Callable[[], Model]) -> Model:
    """What ``build`` makes, with the weights of ``checkpoints/latest``, in evaluation mode.

    A checkpoint holds what was trained alone: all other weights stay as ``build`` made them. It is called once the
    checkpoint has been read. Raises HpcmmError if there is no checkpoint, it does not fit the model, or another user
    could have written it.
    """
    state = read_trained(run)
    model = build()
    try:
        unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise HpcmmError(f"The checkpoint of {run.root} cannot be loaded: {reason}") from error
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    lacking = sorted(trained & set(unknown.missing_keys))
    if lacking or unknown.unexpected_keys:
        names = lacking or unknown.unexpected_keys
        raise HpcmmError(f"The checkpoint of {run.root} is of another model: {names[0]} does not fit.")
    return model.eval()
