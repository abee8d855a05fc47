"""The weights that a run has trained, read from its newest checkpoint, and a model that has them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from hpcmm.errors import HpcmmError
from hpcmm.files import other_writer
from hpcmm.runs.checkpoints import newest_checkpoint
from hpcmm.runs.run_dir import RunDir


def read_trained(run: RunDir) -> dict[str, Tensor]:
    """The trained parameters and the buffers of ``checkpoints/latest``, float32, on the CPU.

    Raises HpcmmError where there is no checkpoint, it cannot be read, or another user could have written it.
    """
    tag = _latest(run)
    folders = (run.root, run.checkpoints, run.checkpoints / tag)
    _refuse_if_others_write(*folders, *sorted((run.checkpoints / tag).iterdir()))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: PLC0415 - takes seconds

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it reports on each of its files
            state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
                str(run.checkpoints), tag, exclude_frozen_parameters=True
            )
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise HpcmmError(f"The checkpoint {run.checkpoints / tag} cannot be loaded: {reason}") from error
    return state


def start_from(model: nn.Module, folder: str) -> None:
    """Give ``model`` what the run in ``folder`` trained. What that run did not have stays as it is.

    Raises HpcmmError where that run has no checkpoint, or trained something that ``model`` lacks.
    """
    run = RunDir(Path(folder))
    state = read_trained(run)
    own = model.state_dict()
    wrong = sorted(name for name, value in state.items() if name not in own or own[name].shape != value.shape)
    if wrong:
        raise HpcmmError(
            f"train.init_from={folder}: that run's {wrong[0]} does not fit this model: choose the same encoders, "
            "decoder and widths."
        )
    model.load_state_dict(state, strict=False)


def _latest(run: RunDir) -> str:
    try:
        tag = newest_checkpoint(run)
    except OSError as error:
        raise HpcmmError(
            f"{run.checkpoints} holds no finished checkpoint ({error.strerror}): has the run trained to its end?"
        ) from error
    if not tag or Path(tag).name != tag or not (run.checkpoints / tag).is_dir():
        raise HpcmmError(f"{run.newest_checkpoint} names {tag!r}, but there is no such checkpoint beside it.")
    return tag


def _refuse_if_others_write(*paths: Path) -> None:
    """A checkpoint is a pickle: whoever can write it can run code as its reader."""
    if (path := other_writer(*paths)) is not None:
        raise HpcmmError(
            f"{path} can be written by another user, and reading a checkpoint runs code from it: "
            "take it over (chown, chmod go-w) if you trust it."
        )


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
