"""The omni-modal language model's scores to ``hpcmm.evaluate``: accuracy by kind of question, beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hpcmm.evaluate.evaluation import MEAN, Evaluation, Progress, Scored
from hpcmm.workloads.omni.schema import LanguageModelKind, OmniConfig

if TYPE_CHECKING:
    import torch

    from hpcmm.workloads.omni.data.kinds import AnswerKind
    from hpcmm.workloads.omni.models import OmniModel
    from hpcmm.workloads.omni.scoring import ScoredAnswer

POOLED = "all answers"
MADE = "made conversations"
_TEXT = "text"
_Z_95 = 1.959964
"""Of a normal distribution 95% lies within so many standard deviations."""


class OmniEvaluation(Evaluation):
    """Shares of right answers to the held-out questions, by kind and by modality."""

    metrics = ("accuracy",)
    charted = ("accuracy",)
    pooled = POOLED
    named_by = ("model/language_model=", "model.language_model=", "model=")
    samples = "the held-out conversations"
    columns = """share of right answers with its 95% interval, and what
                   guessing gives, of each kind of question and of each modality"""
    notes = """An answer is right if the likeliest token is the true one at each of its places, which is what the
model writes if it always takes the likeliest. Intervals are Wilson's."""

    def model_name(self, config: OmniConfig) -> str:
        language = config.model.language_model
        if language.kind is LanguageModelKind.folder:
            return Path(language.path or "").name
        return f"tiny_{language.architecture}" if language.kind is LanguageModelKind.tiny else str(language.kind)

    def build_model(self, config: OmniConfig) -> OmniModel:
        from hpcmm.workloads.omni.answering import model_of  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.omni.folders import prepare  # noqa: PLC0415

        prepare(config)
        return model_of(config)

    def score(self, model: OmniModel, config: OmniConfig, device: torch.device, progress: Progress) -> Scored:
        from hpcmm.workloads.omni.data.kinds import read_kinds  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.omni.folders import conversations_folder  # noqa: PLC0415
        from hpcmm.workloads.omni.scoring import HeldOut  # noqa: PLC0415

        held_out, answers, done = HeldOut.of(config, model, device), list[Any](), 0
        for examples, row in held_out.score(model, range(len(held_out))):
            answers += row
            done += examples
            progress(done, len(held_out))
        root = conversations_folder(config)
        name = MADE if config.data.root is None else root.name
        return Scored(by_kind(answers, read_kinds(root)), trained_on=name, scored_on=name)

    def remarks(self, table: pd.DataFrame) -> list[str]:
        said = [_beside_chance(own) for _, own in table.groupby("run", sort=False)]
        if MADE in {*table["trained_on"], *table["scored_on"]}:
            said.append(
                "These conversations are made by hpcmm: the scores say that training works, and nothing about "
                "published benchmarks."
            )
        return said


def by_kind(answers: Sequence[ScoredAnswer], kinds: Mapping[str, AnswerKind]) -> pd.DataFrame:
    """One row a kind of question, called MODALITY: KIND, one a modality, one of all answers, and their mean.

    Columns: ``category``, ``answers`` (their number), ``accuracy``, ``lower_95`` and ``upper_95``, ``chance``, which is
    nan if ``kinds`` does not tell that of all answers. The mean is over the kinds.
    """
    found = pd.DataFrame(
        [(_modality(kinds, each.kind), each.kind, each.right, _chance(kinds, each.kind)) for each in answers],
        columns=["modality", "kind", "right", "chance"],
    )
    rows = [
        _row(f"{modality}: {kind}", own) for (modality, kind), own in found.groupby(["modality", "kind"], sort=True)
    ]
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("accuracy", "chance")}
    rows += [_row(str(modality), own) for modality, own in found.groupby("modality", sort=True)]
    rows += [_row(POOLED, found), {"category": MEAN, "answers": len(found), **mean}]
    return pd.DataFrame(rows)


def _beside_chance(table: pd.DataFrame) -> str:
    """One run's shares by modality, with what guessing gives if that is known."""
    modalities = table[~table["category"].isin([POOLED, MEAN]) & ~table["category"].str.contains(": ")]
    said = []
    for row in modalities.to_dict("records"):
        guessed = "" if np.isnan(row["chance"]) else f", by guessing {row['chance']:.3f}"
        interval = f"95% interval {row['lower_95']:.3f} to {row['upper_95']:.3f}"
        said.append(f"{row['category']} {row['accuracy']:.3f} of {row['answers']} ({interval}{guessed})")
    return f"{table['model'].iloc[0]}, seed {table['seed'].iloc[0]}, right answers: {'; '.join(said)}."


def wilson_interval(right: int, answers: int) -> tuple[float, float]:
    """The 95% interval of a share, ``right`` of ``answers``, which stays between 0 and 1.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    share, spread = right / answers, _Z_95**2 / answers
    centre = (share + spread / 2) / (1 + spread)
    reach = _Z_95 / (1 + spread) * float(np.sqrt(share * (1 - share) / answers + spread / (4 * answers)))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _row(category: str, answers: pd.DataFrame) -> dict[str, Any]:
    right = int(answers["right"].sum())
    lower, upper = wilson_interval(right, len(answers))
    return {
        "category": category,
        "answers": len(answers),
        "accuracy": right / len(answers),
        "lower_95": lower,
        "upper_95": upper,
        "chance": float(answers["chance"].mean(skipna=False)),
    }


def _modality(kinds: Mapping[str, AnswerKind], kind: str) -> str:
    return (kinds[kind].modality if kind in kinds else None) or _TEXT


def _chance(kinds: Mapping[str, AnswerKind], kind: str) -> float:
    chance = kinds[kind].chance if kind in kinds else None
    return float("nan") if chance is None else chance
