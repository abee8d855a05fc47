"""The omni-modal workload: what it says of its keys without torch, and its half on a rank."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.answering import Answerer
from hpcmm.workloads.omni.data.conversations import TEST, ConversationFile
from hpcmm.workloads.omni.folders import prepare
from hpcmm.workloads.omni.models import build_model
from hpcmm.workloads.omni.training import OmniTraining, groups_by_rate
from hpcmm.workloads.omni.workload import OmniWorkload

WORKLOAD = OmniWorkload()
QWEN = {
    "model_type": "qwen3_moe", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 16,
    "num_key_value_heads": 2, "intermediate_size": 99, "moe_intermediate_size": 32, "num_experts": 6,
    "num_experts_per_tok": 2, "vocab_size": 500,
}  # fmt: skip


def composed(*overrides: str) -> Any:
    return compose_run(["task=omni", "cluster=local", *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(HpcmmError) as error:
        validate(composed(*overrides))
    return str(error.value)


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Overrides for a data folder of a few conversations."""
    root = tmp_path / "data"
    root.mkdir()
    for number, side in enumerate((16, 40)):
        Image.new("RGB", (side, 16), (255 * number, 0, 0)).save(root / f"{number}.png")
        with wave.open(str(root / f"{number}.wav"), "wb") as opened:
            opened.setnchannels(1)
            opened.setsampwidth(2)
            opened.setframerate(16_000)
            opened.writeframes(np.zeros(4000 * (number + 1), "<i2").tobytes())
    lines = [json.dumps({"turns": turns(number)}) for number in range(7)]
    for name in ("train.jsonl", "test.jsonl"):
        (root / name).write_text("\n".join(lines) + "\n")
    (root / "kinds.json").write_text(json.dumps({"colour": {"modality": "image"}, "length": {"modality": "sound"}}))
    return [
        f"data.root={root}", f"cluster.cache_dir={tmp_path / 'cache'}", "model.language_model.tiny.layers=1",
        "model.modalities.image.layers=1", "model.modalities.sound.layers=1", "model.modalities.sound.window_s=0.5",
        "train.micro_batch_size=2",
    ]  # fmt: skip


def turns(number: int) -> list[dict[str, Any]]:
    """A question on an image, on a sound, on both one after the other, or on neither."""
    which = number % 2
    found: list[dict[str, Any]] = []
    if number % 4 in (0, 2):
        found += [user({"type": "image", "path": f"{which}.png"}, "What colour?"), said("red", "colour")]
    if number % 4 in (1, 2):
        found += [user({"type": "sound", "path": f"{which}.wav"}, "How long?"), said("short", "length")]
    return found or [user({"type": "text", "text": "Well? "}, "What?"), said("yes", "word")]


def user(part: dict[str, str], question: str) -> dict[str, Any]:
    return {"role": "user", "content": [part, {"type": "text", "text": question}]}


def said(answer: str, kind: str) -> dict[str, Any]:
    return {"role": "assistant", "kind": kind, "content": [{"type": "text", "text": answer}]}


def test_a_model_can_be_cut_along_all_axes_that_its_architecture_has():
    dense, with_experts = composed(), composed("model/language_model=tiny_mixtral")
    assert WORKLOAD.axes(dense) == {"data", "sequence", "tensor", "pipeline"}
    assert WORKLOAD.axes(with_experts) == {"data", "sequence", "tensor", "pipeline", "expert"}
    assert WORKLOAD.model_shape(dense).experts == 0
    assert WORKLOAD.model_shape(with_experts).experts == 4


def test_the_sizes_of_a_folder_are_read_if_it_is_seen(tmp_path: Path):
    config = composed("model/language_model=folder", f"model.language_model.path={tmp_path}")
    assert WORKLOAD.model_shape(config) is None
    assert "expert" in WORKLOAD.axes(config)  # it may have some: a rank will know
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    shape = WORKLOAD.model_shape(config)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_width) == (3, 8, 2, 16)
    assert (shape.intermediate, shape.experts, shape.experts_per_token, shape.vocabulary) == (32, 6, 2, 500)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert WORKLOAD.axes(config) == {"data"}
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert WORKLOAD.model_shape(config) is None


def test_the_paths_that_a_user_named_are_known_by_their_keys():
    config = composed("data.root=/data", "model=omni", "model.modalities.image.weights=/clip")
    assert WORKLOAD.given_paths(config) == {
        "data.root": "/data", "model.language_model.path": None, "model.modalities.image.weights": "/clip",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.language_model.architecture=gpt"], "architecture is 'gpt', but must be llama or mixtral"),
        (["model.language_model.tiny.kv_heads=3"], "tiny.heads is 4, but must be a multiple of kv_heads, 3."),
        (["model.language_model.tiny.width=60"], "tiny.width is 60, but must be a multiple of twice the heads, 8."),
        (["model.language_model.tiny.experts=1"], "experts_per_token is 2, but there are 1 experts."),
        (["model/language_model=folder"], "model.language_model.path is not given"),
        (
            ["model/language_model=tiny_mixtral", "model.language_model.tiny.router_loss=true", "parallel=pipeline"],
            "asks for the router's loss (output_router_logits)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_job(overrides: list[str], said: str):
    assert said in refusal("cluster.ranks_per_node=2", *overrides)


def test_a_size_of_a_small_model_is_not_blamed_on_a_folder():
    said = refusal("model.language_model.tiny.layers=0")
    assert "tiny.layers is 0, but must be at least 1." in said
    assert "config.json" not in said


def test_parts_have_learning_rates_of_their_own():
    config = composed("train.encoder_learning_rate=1e-5", "train.learning_rate=1e-3")
    model = build_model(config.model)
    groups = groups_by_rate(model, config.train)
    assert [group.get("lr") for group in groups] == [None, 1e-5]
    encoders = {id(each) for key in model.modalities for each in model.modalities[key].encoder.parameters()}
    assert {id(each) for each in groups[1]["params"]} <= encoders
    trained = [each for each in model.parameters() if each.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_a_rank_trains_and_every_answer_is_scored_once_however_many_ranks_share_them(own: list[str]):
    config = composed(*own)
    validate(config)
    prepare(config)
    training = OmniTraining(config, torch.device("cpu"))
    batches = training.batches(0, 1, 0)
    batch = next(batches)
    loss, _ = training.loss(training.model, batch)
    loss.backward()
    assert training.tokens(batch) == batch.labelled > 0
    assert torch.equal(next(training.batches(0, 1, 1)).tokens, next(batches).tokens)
    training.model.eval()
    alone = training._own_answers(training.model, 0, 1)
    shared = [training._own_answers(training.model, rank, 3) for rank in range(3)]
    assert sorted(alone) == sorted(answer for own in shared for answer in own)
    assert sorted(answer.kind for answer in alone) == ["colour"] * 4 + ["length"] * 4 + ["word"]


def test_a_trained_model_answers_a_conversation(own: list[str]):
    config = composed(*own)
    prepare(config)
    training = OmniTraining(config, torch.device("cpu"))
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=5e-3)
    batches = training.batches(0, 1, 0)
    for _ in range(60):
        batch = next(batches)
        optimizer.zero_grad()
        (training.loss(training.model, batch)[0] / batch.labelled).backward()
        optimizer.step()
    root = Path(config.data.root)
    asked = [ConversationFile(root / TEST, None)[number] for number in (0, 1, 3)]
    answerer = Answerer(training.model, config, torch.device("cpu"))
    questions = [type(each)(each.turns[:-1], each.origin) for each in asked]
    assert answerer.answer(questions) == ["red", "short", "yes"]
