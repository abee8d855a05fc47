"""The data set that is made: what it holds, that it is the same each time, and that it can be learnt."""

import hashlib
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.data.conversations import TEST, TRAIN, ConversationFile
from hpcmm.workloads.omni.data.images import read_image
from hpcmm.workloads.omni.data.kinds import KINDS_FILE, AnswerKind, read_kinds
from hpcmm.workloads.omni.data.made.folder import STAMP, made_folder, make_folder
from hpcmm.workloads.omni.data.made.pictures import Drawing, Photographs, draw
from hpcmm.workloads.omni.data.made.questions import KINDS, Planner, Speech
from hpcmm.workloads.omni.data.made.speech import Take
from hpcmm.workloads.omni.data.sounds import read_sound


def plan(count, *, held_out=False, text_words=8.0, text_spread=0.8):
    rng = np.random.default_rng(0)
    planner = Planner(rng, held_out=held_out, text_words=text_words, text_spread=text_spread)
    return [question for questions in planner.conversations(count) for question in questions]


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_conversations_have_pictures_sounds_both_or_neither(made):
    kinds = Counter()
    for name in (TRAIN, TEST):
        for conversation in ConversationFile(made / name, ("image", "sound")):
            kinds[frozenset(part.type for turn in conversation.turns for part in turn.content) - {"text"}] += 1
    assert {tuple(sorted(each)) for each in kinds} == {(), ("image",), ("sound",), ("image", "sound")}


def test_pictures_and_sounds_have_sizes_and_lengths_of_their_own(made):
    sizes = {read_image(path).shape for path in (made / "image").iterdir()}
    lengths = {len(read_sound(path, 16_000)) for path in (made / "sound").iterdir()}
    assert len(sizes) > 20
    assert len(lengths) > 20
    assert all(32 <= side <= 144 for size in sizes for side in size[:2])
    assert all(0.2 < length / 16_000 < 6 for length in lengths)


def test_the_same_parameters_make_the_same_files_and_others_another_folder(made, small, tmp_path):
    again = tmp_path / "again"
    make_folder(again, small, seed=0)
    assert digests(again) == digests(made)
    folders = {
        made_folder(data, seed, tmp_path)
        for data, seed in ((small, 0), (small, 1), (replace(small, text_words=9.0), 0), (replace(small, root="x"), 0))
    }
    assert len(folders) == 3


def test_a_set_that_is_there_is_left_as_it_is(made, small, monkeypatch):
    before = (made / STAMP).stat().st_mtime_ns
    monkeypatch.setenv("PATH", "/nowhere")  # nothing is spoken
    make_folder(made, small, seed=0)
    assert (made / STAMP).stat().st_mtime_ns == before
    with pytest.raises(HpcmmError, match="holds a data set of other parameters"):
        make_folder(made, small, seed=1)


def test_a_folder_of_something_else_is_not_touched(tmp_path, small):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(HpcmmError, match="was not made by this generator"):
        make_folder(tmp_path, small, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_espeak_a_sentence_says_what_to_install_and_nothing_is_left(tmp_path, small, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HpcmmError, match="espeak-ng, which is not installed: install Debian's package"):
        make_folder(tmp_path / "set", small, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_an_espeak_that_fails_leaves_nothing_behind(tmp_path, small, monkeypatch):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "espeak-ng"
    program.write_text("#!/bin/sh\necho no such voice >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(HpcmmError, match=r"espeak-ng failed with exit status 3: no such voice\."):
        make_folder(tmp_path / "sets" / "set", small, seed=0)
    assert list((tmp_path / "sets").iterdir()) == []


def test_each_answer_of_a_kind_is_right_equally_often():
    questions = plan(4000)
    for name, kind in KINDS.items():
        counts = Counter(question.answer for question in questions if question.kind == name)
        assert set(counts) == set(kind.answers)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_chance_of_each_kind_is_kept_beside_the_conversations(made):
    kinds = read_kinds(made)
    assert set(kinds) == set(KINDS)
    assert kinds["digit"] == AnswerKind("sound", 0.1)
    assert {turn.kind for each in ConversationFile(made / TEST, None) for turn in each.turns[1::2]} <= set(kinds)


def test_the_text_around_questions_has_a_lognormal_number_of_words():
    short, long = (
        [len(question.text.split()) for question in plan(1500, text_words=words) if question.kind == "digit"]
        for words in (1e-9, 30.0)
    )
    extra = np.array(long) - np.median(short)
    logarithms = np.log(extra[extra > 0])
    assert abs(np.median(logarithms) - math.log(30)) < 0.15
    assert abs(logarithms.std() - 0.8) < 0.15


def test_the_held_out_part_is_spoken_by_other_voices():
    def voices(held_out):
        speech = [
            medium for each in plan(600, held_out=held_out) for medium in each.media if isinstance(medium, Speech)
        ]
        return {take.arguments(0)[2].partition("+")[2] for each in speech for take in each.takes}

    assert voices(True).isdisjoint(voices(False))


def test_the_held_out_part_shows_other_pixels_of_the_photographs(monkeypatch):
    boxes = {True: [], False: []}
    from PIL import Image

    resize, photographs = Image.Image.resize, Photographs()
    for held_out, kept in boxes.items():

        def noting(self, size, resampling, box, kept=kept):
            kept.append(box)
            return resize(self, size, resampling, box=box)

        monkeypatch.setattr(Image.Image, "resize", noting)
        for number in range(20):
            photographs.crop("brick", np.random.default_rng(number), held_out=held_out)
    assert max(right for _, _, right, _ in boxes[False]) <= min(left for left, _, _, _ in boxes[True])


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross", "ring"])
def test_a_drawing_shows_so_many_shapes_of_the_colour(shape):
    from scipy.ndimage import label

    for count in (1, 3, 6):
        pixels = np.asarray(draw(Drawing(shape, "red", count), np.random.default_rng(count)), np.int64)
        _, found = label(pixels[..., 0] - pixels[..., 1] > 70)
        assert found == count


def test_a_word_is_spoken_in_several_ways():
    ways = {tuple(Take("seven", number, False).arguments(0)) for number in range(20)}
    assert len(ways) == 20
    assert all(way[-1] == "seven" for way in ways)


def test_kinds_of_a_users_folder_are_checked(tmp_path):
    assert read_kinds(tmp_path) == {}
    (tmp_path / KINDS_FILE).write_text('{"animal": {"chance": 0.5}, "plant": {"modality": "image", "more": 1}}')
    assert read_kinds(tmp_path) == {"animal": AnswerKind(None, 0.5), "plant": AnswerKind("image", None)}
    for spoiled in ("[]", "{", '{"animal": 3}', '{"animal": {"chance": 2}}', '{"animal": {"chance": true}}'):
        (tmp_path / KINDS_FILE).write_text(spoiled)
        with pytest.raises(HpcmmError, match=r"kinds\.json"):
            read_kinds(tmp_path)
