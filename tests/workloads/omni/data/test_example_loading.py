"""Which conversations a rank reads, and what becomes of those that cannot be used."""

import logging

import pytest
import torch

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.batch import pack
from hpcmm.workloads.omni.data.conversations import ConversationFile
from hpcmm.workloads.omni.data.encoding import Encoder
from hpcmm.workloads.omni.data.loading import Loading, TestExamples, TrainExamples
from hpcmm.workloads.omni.schema import OmniDataConfig, OnError


def talk(number, path="red.png"):
    content = [{"type": "image", "path": path}, {"type": "text", "text": f"Number {number}?"}]
    return {"turns": [{"role": "user", "content": content}, {"role": "assistant", "content": str(number)}]}


@pytest.fixture
def encoder(tokenizer, modalities):
    return Encoder(tokenizer, modalities, 60)


def conversations(encoder, path):
    return ConversationFile(path, encoder.modalities)


def said(batch):
    return [answer.text for answer in batch.answers]


def taken(iterator, count):
    return [said(next(iterator)) for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_share_an_epoch_and_a_resumed_run_goes_on_in_order(encoder, write, num_workers):
    examples = TrainExamples(conversations(encoder, write(*map(talk, range(8)))), encoder, OnError.refuse)
    loading = Loading(OmniDataConfig(num_workers=num_workers), seed=3, pin_memory=False)
    ranks = [taken(loading.endless(examples, 2, rank, 2, first=0), 4) for rank in range(2)]
    epoch = [name for rank in ranks for batch in rank[:2] for name in batch]
    assert sorted(epoch) == sorted(map(str, range(8)))
    assert taken(loading.endless(examples, 2, 1, 2, first=2), 2) == ranks[1][2:]


def test_a_micro_batch_is_one_row_of_so_many_examples(encoder, write):
    examples = TrainExamples(conversations(encoder, write(*map(talk, range(5)))), encoder, OnError.refuse)
    batch = next(Loading(OmniDataConfig(), 0, pin_memory=False).endless(examples, 3, 0, 1, first=0))
    assert batch.examples == 3
    assert batch.tokens.shape[0] == 1
    assert int((batch.positions == 0).sum()) == 3
    assert len(batch.modalities["image"].prepared) == 3
    padded = next(Loading(OmniDataConfig(packed=False), 0, pin_memory=False).endless(examples, 3, 0, 1, first=0))
    assert (said(padded), padded.examples) == (said(batch), 3)


def test_the_seed_alone_changes_the_order_and_no_random_state_is_touched(encoder, write):
    examples = TrainExamples(conversations(encoder, write(*map(talk, range(20)))), encoder, OnError.refuse)
    before = torch.get_rng_state()
    first, again, other = (
        taken(Loading(OmniDataConfig(), seed, pin_memory=False).endless(examples, 4, 0, 1, first=0), 5)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_examples_come_once_in_order(encoder, write):
    examples = TestExamples(conversations(encoder, write(*map(talk, range(5)))), encoder, OnError.refuse)
    batches = Loading(OmniDataConfig(), 0, pin_memory=False).once(examples, [0, 2, 4], 2)
    assert [said(batch) for batch in batches] == [["0", "2"], ["4"]]
    assert examples.conversation(4).turns[1].text == "4"
    with pytest.raises(IndexError):
        examples[5]


@pytest.fixture
def spoiled(encoder, folder, write):
    """Five conversations: the second has a file that is no image, the third is too long, the fourth names nothing."""
    (folder / "broken.png").write_text("no image")
    long = talk(2)
    long["turns"][0]["content"] *= 6
    return conversations(encoder, write(talk(0), talk(1, "broken.png"), long, talk(3, "nowhere.png"), talk(4)))


def test_what_cannot_be_used_ends_the_run_with_its_line(encoder, spoiled):
    examples = TrainExamples(spoiled, encoder, OnError.refuse)
    for index, reason in ((1, "cannot be read"), (2, "more than 60 tokens"), (3, "is not there")):
        with pytest.raises(HpcmmError, match=rf"train\.jsonl, line {index + 1}: .*{reason}"):
            examples[index]


def test_or_the_next_one_takes_its_place_which_is_said_once(encoder, spoiled, caplog):
    examples = TrainExamples(spoiled, encoder, OnError.skip)
    with caplog.at_level(logging.WARNING):
        assert [said(examples[index]) for index in (0, 1, 2, 3, 4, 6)] == [["0"], ["4"], ["4"], ["4"], ["4"], ["4"]]
    assert len(caplog.messages) == 3
    assert all("The next one takes its place, as data.on_error says." in each for each in caplog.messages)
    assert examples.skipped.tolist() == [0, 1, 1, 1, 0]


def test_and_is_left_out_of_the_scores(encoder, spoiled, caplog):
    with caplog.at_level(logging.INFO):
        examples = TestExamples(spoiled, encoder, OnError.skip)
    assert [said(examples[index]) for index in range(len(examples))] == [["0"], ["4"]]
    assert said(pack(list(examples))) == ["0", "4"]
    assert caplog.messages[-1] == "2 of 5 conversations are scored."


def test_a_set_of_which_nothing_can_be_used_is_refused(encoder, write):
    nothing = conversations(encoder, write(talk(0, "nowhere.png"), talk(1, "nowhere.png")))
    with pytest.raises(HpcmmError, match="None of the 2 conversations"):
        TrainExamples(nothing, encoder, OnError.skip)[0]
    with pytest.raises(HpcmmError, match="No conversation of"):
        TestExamples(nothing, encoder, OnError.skip)
