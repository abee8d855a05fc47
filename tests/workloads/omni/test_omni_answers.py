"""Answers: those that are written are those that are scored; and the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_omni import random_example, tiny_model

from hpcmm.workloads.omni.data.batch import Batch, pack, right_answers
from hpcmm.workloads.omni.data.kinds import AnswerKind
from hpcmm.workloads.omni.evaluation import MEAN, POOLED, OmniEvaluation, by_kind, wilson_interval
from hpcmm.workloads.omni.models.answers import write_answers
from hpcmm.workloads.omni.scoring import ScoredAnswer, accuracies
from hpcmm.workloads.tiny_lm import bytes_tokenizer

KINDS = {"colour": AnswerKind("image", 0.25), "count": AnswerKind("image", 0.5), "digit": AnswerKind("sound", 0.1)}
ANSWERS = [
    *[ScoredAnswer("colour", right) for right in (True, True, True, False)],
    *[ScoredAnswer("count", right) for right in (True, False)],
    *[ScoredAnswer("digit", right) for right in (False, True)],
    ScoredAnswer("unnamed", False),
]


def prompt_of(example: Batch) -> tuple[Batch, list[int]]:
    """What stands before an example's answer, and the answer's tokens."""
    answer = example.answers[0].tokens
    cut = {name: getattr(example, name)[:, :-answer] for name in ("tokens", "positions", "labels")}
    tokens = example.tokens[0, -answer:].tolist()
    return Batch(**cut, modalities=example.modalities), tokens


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_the_model_writes_the_answers_that_are_scored_as_right(architecture: str):
    tokenizer = bytes_tokenizer()
    model = tiny_model(architecture)
    rng = np.random.default_rng(0)
    examples = [random_example(model, rng, things) for things in (["image"], [], ["sound", "image"], [])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):  # long enough for some of them, not for all
        optimizer.zero_grad()
        model(pack(examples[:2])).total.backward()
        optimizer.step()
    model.eval()
    prompts, wanted = zip(*[prompt_of(each) for each in examples], strict=True)
    with torch.no_grad():
        right = right_answers(pack(examples), model(pack(examples)).correct)
    written = [
        write_answers(model, [prompt], tokenizer, [1], len(tokens))[0].text
        for prompt, tokens in zip(prompts, wanted, strict=True)
    ]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in wanted]
    assert [said == text for said, text in zip(written, texts, strict=True)] == right
    assert right[:2] == [True, True]
    assert not all(right)
    longest = max(map(len, wanted))
    together = write_answers(model, prompts, tokenizer, [1], longest)
    alone = [write_answers(model, [prompt], tokenizer, [1], longest)[0] for prompt in prompts]
    assert together == alone


def test_an_answer_ends_at_the_first_token_that_ends_one_or_is_cut_off():
    tokenizer = bytes_tokenizer()
    model = tiny_model().eval()
    prompts = [random_example(model, np.random.default_rng(seed), []) for seed in range(2)]
    cut_off = write_answers(model, prompts, tokenizer, [1], 6)
    assert [(each.tokens, each.ended) for each in cut_off] == [(6, False)] * 2
    embedded = model.embed(prompts[0]).embedded
    with torch.no_grad():
        first = int(model.trunk.lm(inputs_embeds=embedded).logits[0, -1].argmax())
    assert write_answers(model, prompts[:1], tokenizer, [first], 6) == [("", 0, True)]


def test_accuracies_are_of_all_answers_and_of_each_modality():
    found = accuracies(ANSWERS, lambda kind: (KINDS[kind].modality if kind in KINDS else None) or "text")
    assert found == {
        "accuracy": pytest.approx(5 / 9),
        "accuracy_image": pytest.approx(4 / 6),
        "accuracy_sound": 0.5,
        "accuracy_text": 0,
    }


def test_the_table_has_a_row_a_kind_a_modality_and_all_answers_beside_chance():
    table = by_kind(ANSWERS, KINDS).set_index("category")
    assert list(table.index) == [
        "image: colour", "image: count", "sound: digit", "text: unnamed", "image", "sound", "text", POOLED, MEAN,
    ]  # fmt: skip
    assert table.loc["image", "accuracy"] == pytest.approx(4 / 6)
    assert table.loc["image", "chance"] == pytest.approx((4 * 0.25 + 2 * 0.5) / 6)
    assert table.loc["image: colour", "answers"] == 4
    assert table.loc[MEAN, "accuracy"] == pytest.approx(np.mean([0.75, 0.5, 0.5, 0]))
    assert np.isnan(table.loc["text", "chance"])
    assert np.isnan(table.loc[POOLED, "chance"])
    assert (table["lower_95"] <= table["accuracy"])[:-1].all()


def test_what_is_said_of_a_run_sets_each_modality_beside_guessing():
    table = by_kind(ANSWERS, KINDS).assign(run="one", model="tiny_llama", seed=3, trained_on="own", scored_on="own")
    (said,) = OmniEvaluation().remarks(table)
    assert said == (
        "tiny_llama, seed 3, right answers: image 0.667 of 6 (95% interval 0.300 to 0.903, by guessing 0.333); "
        "sound 0.500 of 2 (95% interval 0.095 to 0.905, by guessing 0.100); "
        "text 0.000 of 1 (95% interval 0.000 to 0.793)."
    )


def test_wilsons_interval_is_that_of_the_tables():
    assert wilson_interval(8, 10) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.161, abs=1e-3))
    assert wilson_interval(20, 20)[1] == 1.0
