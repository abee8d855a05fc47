"""The tokenizer that is made of a data set's text, and those of models' folders."""

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.tokenizer import ensure_tokenizer, load_tokenizer, made_tokenizer_folder, make_tokenizer

TEXTS = ["which colour is the square", "the square is red", "the circle is blue"] * 5


def test_it_writes_any_text_and_reads_it_again():
    tokenizer = make_tokenizer(TEXTS, 400)
    assert 260 < len(tokenizer) <= 400
    for text in ("the square is red", "Größe 大きさ 🧱\n\t  spaces", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" square")["input_ids"]) == 1


def test_the_same_text_makes_the_same_tokenizer():
    assert make_tokenizer(TEXTS, 400).get_vocab() == make_tokenizer(TEXTS, 400).get_vocab()


def test_a_folder_of_it_is_one_of_transformers_and_keeps_its_template(tmp_path, write):
    root = write({"turns": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]}).parent
    folder = made_tokenizer_folder(root, 300, tmp_path / "cache")
    ensure_tokenizer(folder, root, 300)
    loaded = load_tokenizer(folder)
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]
    assert loaded.apply_chat_template(talk, tokenize=False) == "<|user|>Which?<|end|><|assistant|>red<|end|>"
    assert loaded.eos_token_id == loaded.convert_tokens_to_ids("<|end|>")
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    ensure_tokenizer(folder, root, 300)
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_another_text_and_another_size_have_another_folder(tmp_path, write):
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]
    root = write({"turns": talk}).parent
    folders = {made_tokenizer_folder(root, size, tmp_path) for size in (300, 400)}
    write({"turns": [*talk, *talk]})
    assert len(folders | {made_tokenizer_folder(root, 300, tmp_path)}) == 3
    with pytest.raises(HpcmmError, match=r"train\.jsonl cannot be read"):
        made_tokenizer_folder(tmp_path / "nowhere", 300, tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(HpcmmError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(HpcmmError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(HpcmmError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
