"""Opens local folders of ``transformers`` models: safetensors alone, nothing is downloaded."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hpcmm.errors import HpcmmError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER = "adapter_config.json"
PREPROCESSING = "preprocessor_config.json"


def check_folder(folder: Path, what: str, key: str) -> None:
    """Raises HpcmmError, naming what lacks, if ``folder`` cannot be one of ``transformers`` models with safetensors.

    ``what`` is the thing as messages call it, and ``key`` the configuration key that names the folder.
    """
    if not folder.is_dir():
        raise HpcmmError(f"The folder of {what}, {folder}, does not exist: set {key} to a transformers model's folder.")
    if not (folder / "config.json").is_file():
        raise HpcmmError(f"{folder} has no config.json, so it holds no {what}; {key} must name a transformers model.")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise HpcmmError(
            f"{folder} has no {WEIGHTS[0]}: {what} is read from safetensors alone, since other weights are pickles "
            "that can run code; convert them with transformers' save_pretrained."
        )


def check_no_adapter(folder: Path, key: str) -> None:
    """Raises HpcmmError if ``folder`` holds an adapter, which ``transformers`` would put into the model unasked."""
    if (folder / ADAPTER).is_file():
        raise HpcmmError(
            f"{folder} has {ADAPTER}, so it holds an adapter beside or without its model: merge the two with peft's "
            f"merge_and_unload, and name the folder of the result as {key}."
        )


def load_pretrained(model_class: Any, folder: Path, what: str, key: str, **options: Any) -> Any:
    """``model_class.from_pretrained`` of a local folder: float32, in evaluation mode, every weight found.

    ``options`` go to it. Raises HpcmmError if the folder does not hold such a model. Tensors of the file that the
    class does not use, such as another tower's, are left out; tensors that lack, or are of another shape, are an error.
    """
    check_folder(folder, what, key)
    check_no_adapter(folder, key)
    with quiet():
        try:
            model, report = model_class.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except Exception as error:  # damaged files show as errors of many libraries
            raise HpcmmError(
                f"{what[:1].upper()}{what[1:]} in {folder} cannot be loaded: {first_line(error)}."
            ) from error
    check_report(report, folder, what)
    return model.eval()


def check_report(report: Mapping[str, Any], folder: Path, what: str) -> None:
    """Raises HpcmmError if a loading report of ``transformers`` has tensors that lack, or are of another shape.

    The model must have been loaded with ``ignore_mismatched_sizes``, for else the report says nothing of shapes.
    """
    others = sorted(report["mismatched_keys"])
    if others:
        name, found, expected = others[0]
        raise HpcmmError(
            f"The weights in {folder} are not of {what} that its config.json describes: {name} is of the shape "
            f"{tuple(found)}, not {tuple(expected)}."
        )
    lacking = sorted(report["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise HpcmmError(f"The weights in {folder} are not of {what}: they lack {lacking[0]}{more}.")


def clip_config(folder: Path, key: str) -> Any:
    """The ``CLIPConfig`` of a folder with both towers. Raises HpcmmError if it is of another model."""
    from transformers import CLIPConfig  # noqa: PLC0415 - takes seconds

    check_folder(folder, "CLIP", key)
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = content["model_type"]
        config = CLIPConfig.from_dict(content)
    except Exception as error:
        raise HpcmmError(f"{folder / 'config.json'} cannot be read as CLIP's: {first_line(error)}") from error
    if kind != CLIPConfig.model_type:
        raise HpcmmError(f"{folder} holds a model of type {kind!r}, but {key} must name a CLIP model with both towers.")
    # The published folders repeat the length of the embeddings in each tower's part, others need not.
    config.vision_config.projection_dim = config.text_config.projection_dim = config.projection_dim
    return config


def model_type_of(folder: Path, what: str, key: str) -> str:
    """The ``model_type`` of a folder's ``config.json``. Raises HpcmmError if the folder holds no model."""
    check_folder(folder, what, key)
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HpcmmError(f"{folder / 'config.json'} tells no model_type: {error!r}.") from error


def pixel_scale(
    folder: Path, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel from the folder, or those given if it does not tell."""
    path = folder / PREPROCESSING
    if not path.is_file():
        return tuple(mean), tuple(std)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = [tuple(float(value) for value in content[key]) for key in ("image_mean", "image_std")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HpcmmError(f"{path} tells no image_mean and image_std of three numbers each: {error!r}.") from error
    is_finite = all(math.isfinite(value) for values in told for value in values)
    if any(len(values) != 3 for values in told) or not is_finite or min(told[1]) <= 0:
        raise HpcmmError(f"{path} must tell image_mean and image_std of three numbers each, the latter above 0.")
    return told[0], told[1]


def load_tokenizer(folder: Path, what: str, key: str) -> Any:
    """The tokenizer of a local folder. Raises HpcmmError if there is none."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise HpcmmError(
                f"The tokenizer of {what} cannot be loaded from {folder}: {first_line(error)}; {key} must name a "
                "folder with tokenizer.json, or vocab.json and merges.txt."
            ) from error


def first_line(error: Exception) -> str:
    """What to tell of another library's error: its first line, and the next one if that has the reason."""
    line, _, rest = (str(error).strip() or type(error).__name__).partition("\n")
    reason = rest.strip().partition("\n")[0] if line.rstrip().endswith(":") else ""
    return f"{line.rstrip()} {reason}".rstrip(".:; ")


@contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor reports on unused tensors: they would fill the logs once a rank."""
    from transformers.utils import logging as their_logging  # noqa: PLC0415

    shows_bars, level = their_logging.is_progress_bar_enabled(), their_logging.get_verbosity()
    their_logging.disable_progress_bar()
    their_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if shows_bars:
            their_logging.enable_progress_bar()
