"""The example of a modality outside of hpcmm: videos as frames, in conversations with images and sounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.workloads.omni.folders import prepare
from hpcmm.workloads.omni.scoring import HeldOut
from hpcmm.workloads.omni.training import OmniTraining

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "video_modality"


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch):
    """As with the current folder, or PYTHONPATH, where the package is."""
    monkeypatch.syspath_prepend(EXAMPLE)
    yield
    for name in ("make_data", "clips", "clips.video"):
        sys.modules.pop(name, None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    import make_data

    make_data.main(tmp_path / "data", train=12, test=4)
    return tmp_path / "data"


def composed(root: Path, *overrides: str) -> Any:
    small = ["model.language_model.tiny.layers=1", "data.vocabulary=400", "train.micro_batch_size=4"]
    own = [f"launch.config_dir={EXAMPLE / 'conf'}", "model.modalities.video=video", f"data.root={root}"]
    return compose_run(
        ["task=omni", "cluster=local", f"cluster.cache_dir={root.parent / 'cache'}", *small, *own, *overrides]
    )


def trained(config: Any, steps: int) -> tuple[OmniTraining, list[float]]:
    """The losses, a mean over tokens, of so many steps in this process."""
    validate(config)
    prepare(config)
    training = OmniTraining(config, torch.device("cpu"))
    optimizer = torch.optim.AdamW(training.model.parameters(), 1e-2)
    batches, losses = training.batches(0, 1, 0), []
    for _ in range(steps):
        batch = next(batches)
        loss = training.loss(training.model, batch)[0] / training.tokens(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return training, losses


def test_it_trains_beside_images_and_sounds_and_is_scored(root: Path, capsys: pytest.CaptureFixture[str]):
    config = composed(root)
    training, losses = trained(config, 8)
    assert losses[-1] < losses[0] / 2
    assert "with videos" in capsys.readouterr().out
    held_out = HeldOut.of(config, training.model, torch.device("cpu"))
    scored = {answer.kind for _, row in held_out.score(training.model, range(len(held_out))) for answer in row}
    assert scored == {"direction", "colour", "length"}


def test_a_batch_without_a_video_trains_and_gives_the_encoder_no_gradient(root: Path):
    lines = (root / "train.jsonl").read_text().splitlines()
    without = [line for line in lines if '"video"' not in line]
    assert 0 < len(without) < len(lines)
    (root / "train.jsonl").write_text("\n".join(without) + "\n")
    training, _ = trained(composed(root), 2)
    loss, _ = training.loss(training.model, next(training.batches(0, 1, 2)))
    loss.backward()
    for parameter in training.model.modalities["video"].parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_frames_are_taken_evenly_in_the_order_of_their_numbers(tmp_path: Path):
    from clips.video import VideoModality

    modality = VideoModality(48, most_frames=4)
    for number in range(12):
        Image.new("L", (16, 16), 20 * number).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = modality.read(tmp_path)
    assert video[:, 0, 0, 0].tolist() == [0, 80, 140, 220]
    frames = [Image.new("L", (16, 16), 20 * number) for number in range(12)]
    for kind in ("gif", "webp"):
        path = tmp_path / f"whole.{kind}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        torch.testing.assert_close(modality.read(path), video)
    assert modality([video, video[:1]]).shape == (modality.count(video) + modality.count(video[:1]), 48)


def test_what_cannot_be_used_is_said_in_one_sentence_with_its_line(root: Path):
    video = root / "videos" / "mine"
    video.mkdir(parents=True)
    turns = [
        {"role": "user", "content": [{"type": "video", "path": "videos/mine"}]},
        {"role": "assistant", "content": "up"},
    ]
    (root / "train.jsonl").write_text(json.dumps({"turns": turns}))

    def said() -> str:
        with pytest.raises(HpcmmError) as error:
            trained(composed(root), 1)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert said() == (
        f"{root}/train.jsonl, line 1: The video {video} has no frame: put images in it "
        "(.png, .jpg, .jpeg, .bmp, .tiff, .webp)."
    )
    Image.new("RGB", (16, 16)).save(video / "0.png")
    Image.new("RGB", (32, 16)).save(video / "1.png")
    assert "are of the sizes [(16, 16), (32, 16)]: give a video's frames one size." in said()
    (video / "1.png").write_bytes((video / "0.png").read_bytes()[:40])
    assert f"The image {video / '1.png'} cannot be read" in said()
    turns[0]["content"] = [{"type": "video", "path": "train.jsonl"}]
    (root / "train.jsonl").write_text(json.dumps({"turns": turns}))
    assert "train.jsonl cannot be read as a GIF or WebP" in said()


def test_a_key_that_the_class_does_not_take_is_refused_before_the_job(root: Path):
    with pytest.raises(HpcmmError, match=r"model.modalities.video.frames is not a parameter of VideoModality; "):
        validate(composed(root, "model.modalities.video.frames=3"))
