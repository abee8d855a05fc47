"""Where a run's conversations lie, and what its preparation makes and says."""

from dataclasses import replace

import pytest

from hpcmm.config.schema import ClusterConfig
from hpcmm.errors import InputError
from hpcmm.workloads.omni.data.tokenizer import load_tokenizer
from hpcmm.workloads.omni.data_root import data_root, ensure_data, ensure_made_tokenizer, tokenizer_folder
from hpcmm.workloads.omni.schema import OmniDataConfig, OnError, data_problems

KINDS = ("image", "sound")
TALK = {"turns": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]}
SEEN = {
    "turns": [
        {"role": "user", "content": [{"type": "image", "path": "red.png"}]},
        {"role": "assistant", "content": "x"},
    ]
}
LOST = {
    "turns": [{"role": "user", "content": [{"type": "image", "path": "no.png"}]}, {"role": "assistant", "content": "x"}]
}


@pytest.fixture
def cluster(tmp_path):
    return ClusterConfig(name="here", cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def own(folder, write):
    write(TALK, SEEN, LOST)
    write(TALK, name="test.jsonl")
    return OmniDataConfig(root=str(folder))


def test_a_folder_of_the_users_is_looked_through_before_the_run(own, cluster, folder):
    with pytest.raises(InputError, match=r"train\.jsonl, line 3: the image of turn 1 is no\.png, which is not there"):
        ensure_data(own, 0, cluster, KINDS)
    (folder / "train.jsonl").rename(folder / "training.jsonl")
    with pytest.raises(InputError, match=r"train\.jsonl cannot be read: No such file"):
        ensure_data(own, 0, cluster, KINDS)


def test_what_is_skipped_is_counted(own, cluster, folder, capsys):
    ensure_data(replace(own, on_error=OnError.skip), 0, cluster, KINDS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("which is not there, or is no file. It is left out, as data.on_error says.")
    assert lines[1:] == [
        f"To train on: 3 conversations, 1 with images, 0 with sounds, in {folder}/train.jsonl; 1 cannot be used.",
        f"To be scored on: 1 conversations, 0 with images, 0 with sounds, in {folder}/test.jsonl.",
    ]


def test_nothing_is_written_beside_the_users_files(own, cluster, folder):
    before = sorted(folder.iterdir())
    ensure_made_tokenizer(own, 0, cluster)
    assert sorted(folder.iterdir()) == before
    made = tokenizer_folder(own, 0, cluster)
    assert made.is_relative_to(cluster.cache_dir)
    assert load_tokenizer(made).chat_template


def test_the_data_set_is_made_in_the_cache(made, small, cluster, capsys):
    root = data_root(small, 0, cluster)
    root.parent.mkdir(parents=True)
    made_here = made.parent / "linked"
    made_here.exists() or made_here.symlink_to(made)
    root.symlink_to(made)
    ensure_data(small, 0, cluster, KINDS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" conversations")[0] for line in lines] == ["To train on: 60", "To be scored on: 40"]


def test_without_a_folder_and_without_making_one_there_is_no_data():
    assert list(data_problems(OmniDataConfig())) == []
    assert list(data_problems(OmniDataConfig(root="/data", generate=False))) == []
    assert "data.root is not given" in next(data_problems(OmniDataConfig(generate=False)))
