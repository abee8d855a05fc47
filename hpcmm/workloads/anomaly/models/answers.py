"""Answers in words to questions on images that the model has made its maps of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.anomaly import AnomalyModel, Encoded


def answer(
    model: AnomalyModel, images: Tensor | Encoded, logits: Tensor, captions: Sequence[str], questions: Sequence[str]
) -> list[str]:
    """Answers to one question an image, all at once, each of ``model.llm.max_answer_tokens`` tokens at most.

    Images (B, 3, H, W), or encoded, the logits (B, 2, H, W) that ``model`` gave for them, B captions and B questions.
    Raises HpcmmError if the model has no language model.
    """
    if model.language is None:
        raise HpcmmError("This model was trained without a language model, so it has no words: add model/llm=smollm2.")
    maps = AnomalyModel.anomaly_map(logits)
    return model.language.answer(model.image_features(images), maps, captions, questions)
