"""A run's trained model, from its configuration and its newest checkpoint."""

from __future__ import annotations

import os
import stat
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from hpcmm.config import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.models import AnomalyModel, build_model
from hpcmm.run_dir import RunDir


def load_model(run: RunDir, config: RunConfig) -> AnomalyModel:
    """The model with the weights of ``checkpoints/latest``, float32, in evaluation mode, on the CPU.

    The frozen encoders are no part of a checkpoint: they come from where the configuration says. Raises HpcmmError
    where there is no checkpoint, it does not fit the model, or another user could have written it.
    """
    tag = _latest(run.checkpoints)
    folders = (run.root, run.checkpoints, run.checkpoints / tag)
    _refuse_if_others_write(*folders, *sorted((run.checkpoints / tag).iterdir()))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: PLC0415 - takes seconds

    model = build_model(config.model, config.train.seed)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it reports on each of its files
            state = get_fp32_state_dict_from_zero_checkpoint(str(run.checkpoints), tag, exclude_frozen_parameters=True)
        unknown = model.load_state_dict(state, strict=False)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise HpcmmError(f"The checkpoint {run.checkpoints / tag} cannot be loaded: {reason}") from error
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    lacking = sorted(trained & set(unknown.missing_keys))
    if lacking or unknown.unexpected_keys:
        names = lacking or unknown.unexpected_keys
        raise HpcmmError(f"The checkpoint {run.checkpoints / tag} is of another model: {names[0]} does not fit.")
    return model.eval()


def _latest(checkpoints: Path) -> str:
    try:
        tag = (checkpoints / "latest").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise HpcmmError(
            f"{checkpoints} holds no finished checkpoint ({error.strerror}): has the run trained to its end?"
        ) from error
    if not tag or Path(tag).name != tag or not (checkpoints / tag).is_dir():
        raise HpcmmError(f"{checkpoints / 'latest'} names {tag!r}, but there is no such checkpoint beside it.")
    return tag


def _refuse_if_others_write(*paths: Path) -> None:
    """A checkpoint is a pickle: whoever can write it can run code as its reader."""
    for path in paths:
        facts = path.stat()
        if facts.st_uid not in {os.getuid(), 0} or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise HpcmmError(
                f"{path} can be written by another user, and reading a checkpoint runs code from it: "
                "take it over (chown, chmod go-w) if you trust it."
            )
