"""Reads a file of named tensors without unpickling anything else."""

from __future__ import annotations

import pickle
from pathlib import Path
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hpcmm.errors import HpcmmError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a state dict that ``torch.save`` wrote.

    Raises HpcmmError when the file is missing, damaged, or holds anything but named tensors.
    """
    if not path.is_file():
        raise HpcmmError(f"The weights file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, BadZipFile, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise HpcmmError(f"The weights file {path} cannot be read as a state dict: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise HpcmmError(f"The weights file {path} does not hold a state dict (names and tensors alone).")
    return content
