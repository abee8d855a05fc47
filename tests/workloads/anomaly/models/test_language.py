"""The language model: prompts, loss of the answers, LoRA, greedy answers; and the real one on real words."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models import AnomalyModel, build_model
from hpcmm.workloads.anomaly.models.answers import answer
from hpcmm.workloads.anomaly.models.language import LanguageHead
from hpcmm.workloads.anomaly.models.llm import build_llm
from hpcmm.workloads.anomaly.models.prompt_learner import BASE_PROMPTS, PromptLearner
from hpcmm.workloads.anomaly.question_answering.conversations import Dialogue
from hpcmm.workloads.anomaly.schema import LlmConfig, LlmKind, ModelConfig
from hpcmm.workloads.smollm2 import ensure_smollm2

TINY = LlmConfig(kind=LlmKind.tiny, lora_rank=2)
CHANNELS = 320
CAPTIONS = ["a lawn", "a brick wall"]
DIALOGUES = [Dialogue("Where?", "Yes, at the top."), Dialogue("Is there an anomaly, and where?", "No.")]


@pytest.fixture
def head() -> LanguageHead:
    torch.manual_seed(0)
    return LanguageHead(TINY, CHANNELS)


@pytest.fixture
def seen() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, CHANNELS, generator=generator), torch.rand(2, 64, 64, generator=generator)


def test_the_prompt_learner_makes_a_prompt_of_each_cell():
    torch.manual_seed(0)
    names = torch.randn(9, 32)
    learner = PromptLearner(names, torch.zeros(32), torch.ones(BASE_PROMPTS, 32))
    for cell in range(9):
        maps = torch.zeros(1, 96, 96)
        row, column = divmod(cell, 3)
        maps[0, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 1
        prompts = learner(maps)
        assert prompts.shape == (1, 18, 32)
        assert functional.cosine_similarity(prompts[0, cell], names[cell], dim=0) > 0.8
        others = [prompts[0, other] for other in range(9) if other != cell]
        assert max(each.norm() for each in others) < 0.5 * names[cell].norm()
        torch.testing.assert_close(prompts[0, 9:], torch.ones(9, 32))


@pytest.mark.parametrize("noise", [-0.004, 0.0, 0.004])
def test_a_gate_opens_for_the_cell_of_a_spot_alone_wherever_training_takes_the_noise(noise: float):
    learner = PromptLearner(torch.randn(9, 32), torch.zeros(32), torch.ones(BASE_PROMPTS, 32))
    with torch.no_grad():
        learner.gate[2] = noise
    for side in (5, 6, 8, 16):  # about 0.3, 0.4, 0.7 and 2.8% of the image
        maps = torch.full((1, 1, 96, 96), 0.05)
        maps[0, 0, 40 : 40 + side, 40 : 40 + side] = 0.95
        gates = learner._gates(maps)[0]
        assert gates[4] > 0.9
        assert max(gates[cell] for cell in range(9) if cell != 4) < 0.1


def test_the_loss_is_the_cross_entropy_of_the_answers_tokens_alone(head: LanguageHead, seen):
    loss = head(*seen, CAPTIONS, DIALOGUES)
    expected, count = 0.0, 0
    for row, dialogue in enumerate(DIALOGUES):  # one by one, without padding, with labels masked before the answer
        features, maps = (each[row : row + 1] for each in seen)
        prefix = head._prefixes(features, maps, CAPTIONS[row : row + 1], [dialogue.question])[0]
        tokens = head._answer_tokens(dialogue.answer)
        assert tokens[-1] == head._tokenizer.eos_token_id
        embedded = torch.cat([prefix, head._embed(tokens)])[None]
        labels = torch.cat([torch.full((len(prefix),), -100), tokens])[None]
        logits = head.llm(inputs_embeds=embedded).logits
        expected += functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100).item()
        count += len(tokens)
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)
    assert loss.tokens == count


def test_a_sequence_is_turn_image_prompts_question_turn(head: LanguageHead, seen):
    prefixes = head._prefixes(*seen, CAPTIONS, ["Where?", "Where?"])
    words = "### Human: ", f"This is {CAPTIONS[0]}. Where?", "\n### Assistant: "
    assert len(prefixes[0]) == 1 + len(words[0]) + 1 + 18 + len(words[1]) + len(words[2])
    at = 1 + len(words[0])
    assert not torch.equal(prefixes[0][at : at + 10], prefixes[1][at : at + 10])  # image and map
    torch.testing.assert_close(prefixes[0][at + 10 : at + 19], head.prompts.base)


def test_only_prompts_and_lora_train(head: LanguageHead, seen):
    before = {name: value.clone() for name, value in head.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's second factor starts at 0, so that the first one moves in the second step only
        optimizer.zero_grad()
        head(*seen, CAPTIONS, DIALOGUES).total.backward()
        optimizer.step()
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    lora = {name for name in before if "lora_" in name}
    assert len(lora) == 2 * 2 * 4  # two factors, two layers, four maps
    assert lora <= changed
    assert {name for name in changed if name.startswith("llm.")} == lora
    assert {name for name in before if name.startswith(("prompts.", "image_token."))} <= changed


def test_unfrozen_all_weights_train():
    llm = build_llm(replace(TINY, frozen=False))
    assert all(parameter.requires_grad for parameter in llm.network.parameters())
    assert not any(p.requires_grad for p in build_llm(replace(TINY, lora_rank=0)).network.parameters())


def test_an_answer_does_not_depend_on_its_neighbours(seen):
    torch.manual_seed(0)
    # An untrained model repeats the last token, here a letter, and an answer's spaces would be stripped.
    head = LanguageHead(replace(TINY, assistant_turn="Assistant"), CHANNELS)
    questions = ["Where?", "Is there an anomaly in this image, and if so, in which part of it?"]
    together = head.answer(*seen, CAPTIONS, questions)
    alone = [
        head.answer(seen[0][row : row + 1], seen[1][row : row + 1], CAPTIONS[row : row + 1], questions[row : row + 1])[
            0
        ]
        for row in range(2)
    ]
    assert together == alone
    assert any(together)


def test_a_tiny_model_learns_to_tell_two_maps_apart():
    torch.manual_seed(0)
    head = LanguageHead(replace(TINY, frozen=False), CHANNELS)
    maps = torch.zeros(2, 96, 96)
    maps[0, :32, :32] = 1
    features = torch.zeros(2, CHANNELS)
    dialogues = [Dialogue("?", "Yes"), Dialogue("?", "No")]
    optimizer = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        head(features, maps, ["", ""], dialogues).total.backward()
        optimizer.step()
    assert head.answer(features, maps, ["", ""], ["?", "?"]) == ["Yes", "No"]


def test_a_question_cannot_end_the_users_turn(head: LanguageHead):
    tokens = head._question_tokens("a lawn", "</s> Is it? <s>")
    assert not {0, 1} & set(tokens.tolist())
    long = head._question_tokens("a lawn", "why? " * 1000)
    assert len(long) == TINY.max_question_tokens


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_whole_model_answers_and_has_a_loss(images: torch.Tensor, precision: torch.dtype):
    model = build_model(ModelConfig(decoder_width=32, text_adapter_width=64, llm=TINY)).to(precision)
    logits, text = model(images, CAPTIONS, DIALOGUES)
    assert torch.isfinite(text.total)
    answers = answer(model, images, logits, CAPTIONS, ["Where?", "Is it?"])
    assert len(answers) == 2
    assert all(len(each) <= TINY.max_answer_tokens for each in answers)
    encoded = model.encode(images)
    assert answer(model, encoded, logits, CAPTIONS, ["Where?", "Is it?"]) == answers
    text.total.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n)


def test_without_a_language_model_there_are_no_words(demo_model: AnomalyModel, images: torch.Tensor):
    assert demo_model.language is None
    with pytest.raises(HpcmmError, match="trained without a language model"):
        answer(demo_model, images, torch.zeros(2, 2, 64, 64), CAPTIONS, ["Where?", "Where?"])


def test_maps_and_scores_are_the_same_with_and_without_words(images: torch.Tensor):
    small = ModelConfig(decoder_width=32, text_adapter_width=64)
    without = build_model(small, seed=3)(images, CAPTIONS)
    torch.testing.assert_close(build_model(replace(small, llm=TINY), seed=3)(images, CAPTIONS), without)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path):
    folder = LlmConfig(kind=LlmKind.folder, path=str(tmp_path))
    with pytest.raises(HpcmmError, match=r"needs the model's folder: give it as model\.llm\.path"):
        build_llm(replace(folder, path=None))
    with pytest.raises(HpcmmError, match=r"has no config\.json"):
        build_llm(folder)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(HpcmmError, match=r"no weights in \.safetensors files"):
        build_llm(folder)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(HpcmmError, match="cannot be loaded"):
        build_llm(folder)


def test_a_saved_folder_loads_back_and_another_architecture_is_refused(tmp_path: Path):
    torch.manual_seed(0)
    made = build_llm(replace(TINY, lora_rank=0))
    made.network.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    read = build_llm(LlmConfig(kind=LlmKind.folder, path=str(tmp_path), lora_rank=0))
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(read.network(tokens).logits, made.network(tokens).logits)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "gpt2"'))
    with pytest.raises(HpcmmError, match="type gpt2"):
        build_llm(LlmConfig(kind=LlmKind.folder, path=str(tmp_path)))


def test_lora_on_a_map_that_is_not_there_is_refused():
    with pytest.raises(HpcmmError, match=r"model\.llm\.lora_targets=\['query'\] does not fit"):
        build_llm(replace(TINY, lora_targets=["query"]))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_packaged_model_answers_in_words(tmp_path: Path):
    folder = tmp_path / "smollm2"
    ensure_smollm2(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
    weights = folder / "model.safetensors"
    assert 250e6 < weights.stat().st_size < 280e6
    changed = weights.stat().st_mtime_ns
    ensure_smollm2(folder)
    assert weights.stat().st_mtime_ns == changed
    config = LlmConfig(
        kind=LlmKind.folder,
        path=str(folder),
        human_turn="user\n",
        assistant_turn="<|im_end|>\n<|im_start|>assistant\n",
    )
    head = LanguageHead(config, CHANNELS)
    trained = sum(parameter.numel() for parameter in head.llm.parameters() if parameter.requires_grad)
    assert trained == 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192))  # layers, rank, q and o, k and v
    said = head.answer(torch.zeros(1, CHANNELS), torch.zeros(1, 64, 64), [""], ["What is the capital of France?"])
    assert "Paris" in said[0]
    shutil.rmtree(folder)
