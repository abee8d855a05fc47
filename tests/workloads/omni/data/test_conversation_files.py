"""JSON-lines files of conversations: what they may hold, and what is said of those that hold something else."""

import json
import os

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.conversations import UNNAMED, ConversationFile, Part

ANSWER = {"role": "assistant", "content": "red"}
KNOWN = ("image", "sound")


def asked(*content):
    return {"turns": [{"role": "user", "content": list(content)}, ANSWER]}


def picture(path):
    return asked({"type": "image", "path": path})


def test_turns_mix_texts_and_files_in_any_order_and_number(folder, write):
    path = write(
        {
            "turns": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Is "},
                        {"type": "image", "path": "red.png"},
                        {"type": "text", "text": " as "},
                        {"type": "image", "path": "blue.png"},
                        {"type": "text", "text": "?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "No."}], "kind": "likeness"},
            ],
            "source": "anything else is left alone",
        },
        asked({"type": "text", "text": "Which?"}),
    )
    first, second = ConversationFile(path, KNOWN)
    assert first.roles == ("system", "user", "assistant")
    assert [part.path.name if part.path else part.text for part in first.turns[1].content] == [
        "Is ",
        "red.png",
        " as ",
        "blue.png",
        "?",
    ]
    assert first.turns[2].kind == "likeness"
    assert second.turns[0].content == (Part("text", "Which?"),)
    assert second.turns[1].kind == UNNAMED


def test_empty_lines_count_as_lines_and_as_nothing_else(write):
    path = write("", asked({"type": "text", "text": "Which?"}), "   ", "{}")
    conversations = ConversationFile(path, KNOWN)
    assert len(conversations) == 2
    assert conversations[0].origin.endswith("line 2")
    with pytest.raises(HpcmmError, match=r"train\.jsonl, line 4: it must be an object with a list"):
        conversations[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is not JSON: "),
        ("[" * 100_000, "it is not JSON that can be read"),
        ("9" * 10_000, "it is not JSON that can be read"),
        ("[]", 'a list of "turns"'),
        ({"turns": []}, 'a list of "turns"'),
        ({"turns": [ANSWER] * 513}, 'a list of "turns", 1 to 512 of them'),
        ({"turns": ["hello"]}, "turn 1 must be an object"),
        ({"turns": [{"role": "narrator", "content": "x"}]}, 'whose "role" is system, user or assistant'),
        ({"turns": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        ({"turns": [{"role": "user"}, ANSWER]}, 'the "content" of turn 1'),
        (asked(), 'the "content" of turn 1'),
        (asked({"text": "x"}), 'a part of turn 1 has no "type"'),
        (asked({"type": "text"}), 'has no "text"'),
        (asked({"type": "text", "text": "\ud800"}), "half of a character"),
        (asked({"type": "smell", "path": "red.png"}), '"type" smell, but the model takes text, image or sound'),
        (asked({"type": "image"}), 'the image of turn 1 has no "path"'),
        (picture("green.png"), "is green.png, which is not there, or is no file"),
        (picture("long" * 2000), "..., which is not there, or is no file"),
        (picture("a\x1b[31mb"), "a\N{REPLACEMENT CHARACTER}[31mb, which is not there"),
        ({"turns": [{"role": "assistant", "content": "x", "kind": 3}]}, 'the "kind" of turn 1'),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_file_and_number(write, line, said):
    path = write(asked({"type": "text", "text": "Which?"}), line)
    with pytest.raises(HpcmmError) as caught:
        ConversationFile(path, KNOWN)[1]
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/hostname", "link.png", "away/x.png"])
def test_a_path_cannot_leave_the_data_folder(folder, write, name):
    (folder.parent / "secret.png").write_bytes((folder / "red.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "away").symlink_to(folder.parent)
    with pytest.raises(HpcmmError, match="which leaves the data folder"):
        ConversationFile(write(picture(name)), KNOWN)[0]


def test_a_pipe_in_the_data_folder_is_not_waited_for(folder, write):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(
        HpcmmError, match=r"line 1: the image of turn 1 is pipe\.png, which is not there, or is no file"
    ):
        ConversationFile(write(picture("pipe.png")), KNOWN)[0]
    (folder / "train.jsonl").unlink()
    os.mkfifo(folder / "train.jsonl")
    with pytest.raises(HpcmmError, match="cannot be read: it is not a file"):
        ConversationFile(folder / "train.jsonl", KNOWN)


def test_a_link_within_the_data_folder_and_a_linked_data_folder_can_be_used(folder, write):
    (folder / "same.png").symlink_to("red.png")
    write(picture("same.png"))
    (folder.parent / "linked").symlink_to(folder)
    assert len(list(ConversationFile(folder.parent / "linked" / "train.jsonl", KNOWN))) == 1


def test_a_file_that_is_missing_or_empty_is_named(folder, write):
    with pytest.raises(HpcmmError, match=r"test\.jsonl cannot be read: No such file"):
        ConversationFile(folder / "test.jsonl", KNOWN)
    with pytest.raises(HpcmmError, match="holds no conversation"):
        ConversationFile(write("", ""), KNOWN)


def test_a_line_without_end_is_not_read_into_memory(folder):
    with (folder / "train.jsonl").open("wb") as file:
        file.truncate(1 << 25)
    with pytest.raises(HpcmmError, match="line 1: it has more than 16 MiB"):
        ConversationFile(folder / "train.jsonl", KNOWN)


def test_conversations_of_any_type_are_read_if_no_modalities_are_named(folder, write):
    conversation = ConversationFile(write(asked({"type": "smell", "path": "red.png"})), None)[0]
    assert conversation.turns[0].content[0].type == "smell"


def test_text_beyond_ascii_comes_as_it_is(write):
    text = "Größe 大きさ 🧱"
    assert (
        ConversationFile(write(json.dumps(asked({"type": "text", "text": text}), ensure_ascii=False)), ())[0]
        .turns[0]
        .text
        == text
    )
