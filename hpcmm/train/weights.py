"""A checkpoint's weights as anybody reads them: one ``.safetensors`` file under the model's own names, of any recipe.

DeepSpeed's own files are one a rank, pickles, and cut as the recipe cuts the model. A run goes on from those; scores,
pages and warm starts read this file alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpcmm.errors import HpcmmError

WEIGHTS = "weights.safetensors"
CARRIED = "carried.safetensors"
"""What an earlier run trained and this one does not."""
_IS_CARRIED = "_hpcmm_is_carried"


def trained_weights(names: dict[nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters of a model under DeepSpeed, whole over the ranks that ZeRO divides them over, float32.

    A collective of these ranks, which have to take all of them. ``names``: the parameters' names in the model.
    """
    for parameter, name in names.items():
        if parameter.requires_grad:
            yield name, whole_over_zero(parameter)


def whole_over_zero(parameter: nn.Parameter) -> Tensor:
    """A trained parameter, whole over the ranks that ZeRO divides it over, float32. A collective of these ranks.

    Unless it is no part of one: a float32 parameter that stage 3 has not cut is what the optimizer's parts add up to.
    DeepSpeed would exchange it all the same, one message a parameter.
    """
    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
        return parameter.detach()
    whole = safe_get_full_fp32_param(parameter)
    return (parameter.detach() if whole is None else whole).float()


def buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint keeps, as this rank has them; those of numbers in float32."""
    kept = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in kept:
            yield name, buffer.float() if buffer.is_floating_point() else buffer


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """As ``load_state_dict``, which would also ask for the frozen parameters that were left out."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    trained = {
        name
        for name, parameter in dst.named_parameters()
        if parameter.requires_grad and not _is_divided_expert(parameter)
    }
    wrong = sorted(trained.intersection(missing)) + sorted(unexpected)
    if wrong:
        raise HpcmmError(f"The checkpoint is of another model: {', '.join(wrong[:5])} do not match.")


def _is_divided_expert(parameter: nn.Parameter) -> bool:
    """Whether ZeRO stage 3 has divided an expert's parameter, which it saves with the optimizer's states alone."""
    return hasattr(parameter, "ds_id") and getattr(parameter, "ds_zero_placement_family", "") == "autoep_expert"


def mark_carried(parameters: Iterable[nn.Parameter]) -> None:
    """Note that these came from another run: if they do not train, they are in no other file."""
    for parameter in parameters:
        setattr(parameter, _IS_CARRIED, True)


def keep_carried(model: nn.Module, folder: Path, *, writes: bool) -> None:
    """Keep the frozen parameters that came from another run in ``folder``, that of the run's checkpoints.

    ``writes``: whether this is the rank that writes them. A run that goes on gets those that it began with, whatever
    the other run has become. Call it before the engine is built, which may cut and round the model. Raises OSError, or
    SafetensorError if there is no room.
    """
    file = folder / CARRIED
    if file.is_file():
        model.load_state_dict(_read(file), strict=False)
        return
    carried = {
        name: value.detach()
        for name, value in model.named_parameters()
        if not value.requires_grad and getattr(value, _IS_CARRIED, False)
    }
    if carried and writes:
        partial = folder / f".{CARRIED}.part"
        save_file({name: value.float().cpu().contiguous().clone() for name, value in carried.items()}, partial)
        partial.rename(file)


def add_carried(checkpoints: Path, folder: Path) -> None:
    """Put what :func:`keep_carried` kept into the checkpoint ``folder``: by a link, for it takes no room then."""
    if (file := checkpoints / CARRIED).is_file():
        try:
            os.link(file, folder / CARRIED)
        except OSError:  # not every file system has them
            shutil.copyfile(file, folder / CARRIED)


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write them into the checkpoint ``folder``. Raises OSError, or SafetensorError if there is no room."""
    save_file({name: value.cpu().contiguous().clone() for name, value in weights.items()}, folder / WEIGHTS)


def read_weights(folder: Path) -> dict[str, Tensor] | None:
    """What :func:`write_weights` and :func:`add_carried` put there, on the CPU.

    None if an older version saved the checkpoint, without such a file. Raises HpcmmError if it is damaged.
    """
    if not (folder / WEIGHTS).is_file():
        return None
    carried = _read(folder / CARRIED) if (folder / CARRIED).is_file() else {}
    return {**carried, **_read(folder / WEIGHTS)}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(file)
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    except (OSError, SafetensorError, ValueError, NotImplementedError) as error:  # the last: numbers of 4 bits
        raise HpcmmError(f"The checkpoint {file.parent} cannot be loaded: {error}") from error
