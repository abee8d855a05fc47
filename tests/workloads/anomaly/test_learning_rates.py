"""Which parameters learn how fast."""

from __future__ import annotations

import pytest
import torch

from hpcmm.train.engine import learning_rate_factor
from hpcmm.workloads.anomaly.models import build_model
from hpcmm.workloads.anomaly.schema import AnomalyTrainConfig, LlmConfig, LlmKind, ModelConfig
from hpcmm.workloads.anomaly.training import groups_by_rate

WITH_WORDS = ModelConfig(decoder_width=32, text_adapter_width=32, llm=LlmConfig(kind=LlmKind.tiny, lora_rank=2))


def test_words_learn_at_their_own_rate_and_the_schedule_moves_both():
    model = build_model(WITH_WORDS, 0)
    train = AnomalyTrainConfig(steps=10, learning_rate=1e-4, words_learning_rate=2e-3, warmup_steps=0)
    optimizer = torch.optim.AdamW(groups_by_rate(model, train), lr=train.learning_rate)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    others, words = ([names[id(each)] for each in group["params"]] for group in optimizer.param_groups)
    assert words
    assert all(name.startswith("language.") for name in words)
    assert not any(name.startswith("language.") for name in others)
    assert {*others, *words} == {name for name, each in model.named_parameters() if each.requires_grad}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(train))
    for _ in range(5):  # half way down a cosine
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5e-4, 1e-3])


@pytest.mark.parametrize(
    ("model", "rate"), [(WITH_WORDS, None), (ModelConfig(decoder_width=32, text_adapter_width=32), 2e-3)]
)
def test_else_all_learn_at_one_rate(model: ModelConfig, rate: float | None):
    built = build_model(model, 0)
    (group,) = groups_by_rate(built, AnomalyTrainConfig(learning_rate=1e-4, words_learning_rate=rate))
    assert len(group["params"]) == sum(each.requires_grad for each in built.parameters())
    assert "lr" not in group
