"""Conversations as tokens and labels, and several of them as one row without padding."""

import numpy as np
import pytest
import torch

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.batch import Batch, ModalityBatch, pack, pad, right_answers
from hpcmm.workloads.omni.data.conversations import Conversation, ConversationFile, Part, Turn
from hpcmm.workloads.omni.data.encoding import Encoder

QUESTION = {"type": "text", "text": "What is this?"}
RED, BLUE = {"type": "image", "path": "red.png"}, {"type": "image", "path": "blue.png"}
"""Two tokens and one."""


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(text, kind="colour"):
    return {"role": "assistant", "kind": kind, "content": text}


@pytest.fixture
def encoder(tokenizer, modalities):
    return Encoder(tokenizer, modalities)


@pytest.fixture
def examples(encoder, write):
    """With two pictures and two answers, without a picture, with one picture."""
    path = write(
        {"turns": [user(BLUE, QUESTION, RED), assistant("blue"), user(QUESTION), assistant("a cup", "thing")]},
        {"turns": [user(QUESTION), assistant("red")]},
        {"turns": [user(RED, QUESTION), assistant("red")]},
    )
    return [encoder.example(each) for each in ConversationFile(path, encoder.modalities)]


def test_each_label_is_the_token_that_follows_and_only_answers_have_labels(examples, tokenizer):
    for example in examples:
        learnt = example.labels[0] != -100
        assert torch.equal(example.labels[0, :-1][learnt[:-1]], example.tokens[0, 1:][learnt[:-1]])
        assert example.labelled == int(learnt.sum())
        ends = "".join(f"{answer.text}<|end|>" for answer in example.answers)
        assert tokenizer.decode(example.labels[0][learnt]) == ends


def test_the_last_place_of_an_example_foretells_nothing(examples):
    assert all(example.labels[0, -1] == -100 for example in examples)


def test_the_tokens_of_pictures_lie_where_the_pictures_stand(examples, tokenizer):
    example = examples[0]
    places = example.modalities["image"].places
    assert len(places) == 3
    assert example.tokens[0, places].tolist() == [0, 0, 0]
    assert example.labels[0, places[:2] - 1].tolist() == [-100, -100]
    assert tokenizer.decode(example.tokens[0, places[0] + 1 : places[1]]) == "What is this?"
    assert [prepared.shape for prepared in example.modalities["image"].prepared] == [(16, 16, 3), (16, 32, 3)]


def test_a_row_is_the_examples_one_behind_the_other(examples):
    row = pack(examples)
    assert row.tokens.shape == row.positions.shape == row.labels.shape
    assert row.tokens.shape == (1, sum(example.tokens.shape[1] for example in examples))
    assert row.examples == 3
    starts = np.cumsum([0, *(example.tokens.shape[1] for example in examples)])
    assert torch.nonzero(row.positions[0] == 0)[:, 0].tolist() == starts[:-1].tolist()
    for example, start, end in zip(examples, starts, starts[1:], strict=False):
        for name in ("tokens", "positions", "labels"):
            assert torch.equal(getattr(row, name)[:, start:end], getattr(example, name))
    image = row.modalities["image"]
    assert image.places.tolist() == [
        place + start
        for example, start in zip(examples, starts, strict=False)
        for place in example.modalities["image"].places.tolist()
    ]
    assert len(image.prepared) == 3
    assert row.modalities["sound"].prepared == []
    assert row.modalities["sound"].places.shape == (0,)
    assert row.modalities["sound"].places.dtype == torch.int64


def test_padding_adds_tokens_that_foretell_nothing_and_changes_nothing_else(examples):
    row, padded = pack(examples), pad(examples)
    longest = max(example.tokens.shape[1] for example in examples)
    assert padded.tokens.shape == padded.positions.shape == padded.labels.shape == (1, 3 * longest)
    assert padded.padding == 3 * longest - row.tokens.shape[1]
    assert row.padding == 0
    assert padded.positions.reshape(3, longest).tolist() == [list(range(longest))] * 3
    assert torch.equal(padded.labels[padded.labels != -100], row.labels[row.labels != -100])
    assert padded.answers == row.answers
    places = padded.modalities["image"].places
    assert padded.tokens[0, places].tolist() == [0] * 5
    assert places.tolist() == [
        place + number * longest
        for number, example in enumerate(examples)
        for place in example.modalities["image"].places.tolist()
    ]


def test_a_packed_row_knows_the_length_of_each_example_without_padding(examples):
    lengths = tuple(example.tokens.shape[1] for example in examples)
    assert pack(examples).lengths == pad(examples).lengths == lengths
    assert pack([pack(examples[:2]), examples[2]]).lengths == lengths


def test_an_answer_is_right_if_all_its_tokens_are(examples):
    row = pack(examples)
    assert [answer.kind for answer in row.answers] == ["colour", "thing", "colour", "colour"]
    correct = torch.ones(row.labelled, dtype=torch.bool)
    assert right_answers(row, correct) == [True, True, True, True]
    correct[row.answers[0].tokens] = False
    assert right_answers(row, correct) == [True, False, True, True]
    correct[-1] = False
    assert right_answers(row, correct) == [True, False, True, False]


def test_a_prompt_is_what_stands_before_the_answer(encoder, write):
    path = write({"turns": [user(RED, QUESTION), assistant("red")]})
    whole = ConversationFile(path, encoder.modalities)[0]
    example, prompt = encoder.example(whole), encoder.prompt(Conversation(whole.turns[:1], whole.origin))
    assert prompt.answers == ()
    assert bool((prompt.labels == -100).all())
    assert torch.equal(prompt.tokens, example.tokens[:, : prompt.tokens.shape[1]])
    assert int((example.labels[0] != -100).nonzero()[0]) == prompt.tokens.shape[1] - 1


def test_a_modality_that_hpcmm_does_not_know_is_packed_like_the_others(tokenizer, folder, frames, modalities, write):
    (folder / "clip").mkdir()
    for name in ("red.png", "blue.png"):
        (folder / name).rename(folder / "clip" / name)
    encoder = Encoder(tokenizer, {**modalities, "video": frames})
    path = write({"turns": [user({"type": "video", "path": "clip"}, QUESTION), assistant("red")]})
    example = encoder.example(ConversationFile(path, encoder.modalities)[0])
    assert example.modalities["video"].places.shape == (4,)
    assert len(example.modalities["video"].prepared[0]) == 2


def test_a_longer_example_is_refused_and_never_cut(tokenizer, modalities, write):
    path = write({"turns": [user(RED, BLUE, QUESTION), assistant("red")]})
    conversation = ConversationFile(path, modalities)[0]
    length = Encoder(tokenizer, modalities).example(conversation).tokens.shape[1]
    assert Encoder(tokenizer, modalities, length).example(conversation).tokens.shape[1] == length
    with pytest.raises(HpcmmError, match=rf"train\.jsonl, line 1: it has more than {length - 1} tokens"):
        Encoder(tokenizer, modalities, length - 1).example(conversation)


def test_a_file_that_cannot_be_read_is_named_with_the_line_that_names_it(encoder, folder, write):
    (folder / "broken.png").write_text("no image")
    path = write({"turns": [user({"type": "image", "path": "broken.png"}), assistant("red")]})
    with pytest.raises(HpcmmError, match=r"train\.jsonl, line 1: The image .*broken\.png cannot be read"):
        encoder.example(ConversationFile(path, encoder.modalities)[0])


def test_a_file_without_a_token_and_a_type_without_a_modality_are_refused(encoder, folder, modalities, monkeypatch):
    def talk(kind):
        turns = Turn("user", (Part(kind, path=folder / "red.png"),)), Turn("assistant", (Part("text", "red"),))
        return Conversation(turns, "here")

    with pytest.raises(HpcmmError, match="here: the model takes nothing of the type smell"):
        encoder.example(talk("smell"))
    monkeypatch.setattr(type(modalities["image"]), "count", lambda *_: 0)
    with pytest.raises(HpcmmError, match="is too small to make one token of it"):
        encoder.example(talk("image"))


def test_all_tensors_move_together_also_those_of_the_modalities(examples):
    packed = pack(examples)
    prepared = [{"patches": torch.ones(2), "sizes": (torch.ones(1), 3)}, np.ones(2)]
    batch = Batch(
        packed.tokens, packed.positions, packed.labels, {"x": ModalityBatch(prepared, torch.ones(3))}, packed.answers, 3
    )
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.positions.device.type, moved.labels.device.type} == {"meta"}
    one, other = moved.modalities["x"].prepared
    assert one["patches"].device.type == one["sizes"][0].device.type == "meta"
    assert one["sizes"][1] == 3
    assert isinstance(other, np.ndarray)
    assert (moved.answers, moved.examples) == (batch.answers, 3)
    assert moved.modalities["x"].places.device.type == "meta"


def test_a_tokenizer_that_has_more_tokens_than_the_language_model_is_refused(tokenizer, modalities, write):
    conversation = ConversationFile(write({"turns": [user(RED, QUESTION), assistant("red")]}), modalities)[0]
    largest = int(Encoder(tokenizer, modalities).example(conversation).tokens.max())
    Encoder(tokenizer, modalities, vocabulary=largest + 1).example(conversation)
    with pytest.raises(HpcmmError, match=f"a text has token {largest}, but the language model"):
        Encoder(tokenizer, modalities, vocabulary=largest).example(conversation)
