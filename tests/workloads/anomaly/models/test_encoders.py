"""Image and text encoders: the real weights, other weights from a path, and what is said of bad ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import skimage
import torch
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from torch import nn

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.data.images import normalise, read_image
from hpcmm.workloads.anomaly.models.image_encoders import ImageEncoder, build_image_encoder
from hpcmm.workloads.anomaly.models.image_encoders.efficientnet_lite0 import EfficientNetLite0, packaged_weights
from hpcmm.workloads.anomaly.models.prompt_ensemble import PromptEnsemble
from hpcmm.workloads.anomaly.models.text_encoders import build_text_encoder
from hpcmm.workloads.anomaly.models.text_encoders.sentence import SentenceEncoder, packaged_text_encoder
from hpcmm.workloads.anomaly.models.weights import read_state_dict
from hpcmm.workloads.anomaly.schema import ModelConfig


def build(weights: str | Path | None = None, *, frozen: bool = True) -> ImageEncoder:
    """EfficientNet-Lite0."""
    return build_image_encoder(
        ModelConfig(image_weights=None if weights is None else str(weights), freeze_image_encoder=frozen)
    )


@pytest.fixture(scope="module")
def encoder() -> EfficientNetLite0:
    return build()


@pytest.fixture(scope="module")
def text_encoder() -> SentenceEncoder:
    return SentenceEncoder(packaged_text_encoder())


@pytest.mark.parametrize("side", [64, 96, 100])
def test_maps_have_the_promised_channels_and_strides(encoder: EfficientNetLite0, side: int):
    maps = encoder(torch.zeros(2, 3, side, side))
    expected = [(2, c, -(-side // s), -(-side // s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(features.shape) for features in maps] == expected


def test_sides_that_cannot_be_folded_are_named(encoder: EfficientNetLite0):
    with pytest.raises(HpcmmError, match=r"multiples of 4 pixels, not 64 x 66; change data\.image_size"):
        encoder(torch.zeros(1, 3, 64, 66))


def test_the_finest_map_holds_each_place_of_stride_two(encoder: EfficientNetLite0, images: torch.Tensor):
    stride_two = encoder.blocks[0](encoder.stem(images))
    folded = encoder(images)[0]
    assert torch.equal(torch.nn.functional.pixel_shuffle(folded[:, :64], 2), stride_two)


def test_a_frozen_encoder_stays_as_it_is(encoder: EfficientNetLite0, images: torch.Tensor):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    maps = encoder(images)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(features.requires_grad for features in maps)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_an_encoder_that_is_not_frozen_trains_its_weights_but_not_its_statistics(images: torch.Tensor):
    encoder = build(frozen=False).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    sum(features.square().mean() for features in encoder(images)).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


@pytest.mark.parametrize("kind", ["whole.pth", "without the classifier.pth", "new.safetensors"])
def test_the_packaged_weights_from_a_path_give_the_same_maps(
    encoder: EfficientNetLite0, images: torch.Tensor, tmp_path: Path, kind: str
):
    state = read_state_dict(packaged_weights())
    if kind != "whole.pth":
        state = {name: value for name, value in state.items() if not name.startswith("_fc.")}
    path = tmp_path / kind
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    for ours, theirs in zip(encoder(images), build(path)(images), strict=True):
        assert torch.equal(ours, theirs)


def test_other_weights_from_a_path_give_other_maps(encoder: EfficientNetLite0, images: torch.Tensor, tmp_path: Path):
    state = read_state_dict(packaged_weights())
    state["_conv_stem.weight"] = state["_conv_stem.weight"] * 0.5
    torch.save(state, tmp_path / "own.pth")
    own = build(tmp_path / "own.pth")
    assert not torch.equal(own(images)[0], encoder(images)[0])


class Evil:
    """Pickles as a call."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_weights_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    state = read_state_dict(packaged_weights())
    contents = {
        "pickle.pth": {"_conv_stem.weight": Evil()},
        "list.pth": [torch.zeros(1)],
        "nested.pth": {"model": state},
        "lacks.pth": {name: value for name, value in state.items() if name != "_conv_stem.weight"},
        "other.pth": nn.Linear(2, 2).state_dict(),
        "shape.pth": {**state, "_conv_stem.weight": torch.zeros(1)},
    }
    for name, content in contents.items():
        torch.save(content, name)
    Path("cut.pth").write_bytes(packaged_weights().read_bytes()[:100_000])
    Path("empty.pth").touch()
    Path("text.safetensors").write_text("no tensors here")
    for name in (*contents, "cut.pth", "empty.pth", "text.safetensors", "nowhere.pth"):
        with pytest.raises(HpcmmError, match=name):
            build(name)
    assert not Path("pwned").exists()


def test_unknown_encoders_are_answered_with_the_valid_ones():
    with pytest.raises(HpcmmError, match=r"image_encoder=vgg is not known; valid: clip, .*efficientnet_lite0"):
        build_image_encoder(ModelConfig(image_encoder="vgg"))
    with pytest.raises(HpcmmError, match=r"text_tower=vgg is not known; valid: clip, .*sentence"):
        build_text_encoder(ModelConfig(text_tower="vgg"))


def test_sentences_become_unit_vectors_that_know_their_meaning(text_encoder: SentenceEncoder):
    vectors = text_encoder.encode(
        ["a cat sleeps on the sofa", "a kitten naps on the couch", "the bank raised its rates"]
    )
    assert vectors.shape == (3, text_encoder.width) == (3, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.6
    assert vectors[0] @ vectors[2] < 0.2


def test_padding_does_not_change_an_embedding(text_encoder: SentenceEncoder):
    sentence = "a photo of a brick wall"
    together = text_encoder.encode([sentence, "a much longer sentence that makes the first one need a lot of padding"])
    torch.testing.assert_close(together[0], text_encoder.encode([sentence])[0], atol=1e-5, rtol=0)


def test_state_texts_are_unit_vectors_made_once_a_caption(
    text_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
):
    calls: list[list[str]] = []
    original = text_encoder.encode
    monkeypatch.setattr(text_encoder, "encode", lambda texts: calls.append(list(texts)) or original(texts))
    states = PromptEnsemble(text_encoder)
    first = states.embed(["a lawn", "gravel", "a lawn"])
    second = states.embed(["gravel"])
    assert first.shape == (3, 2, 384)
    assert len(calls) == 2
    assert all("a lawn" in text for text in calls[0])
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], second[0])
    torch.testing.assert_close(first.norm(dim=2), torch.ones(3, 2))
    assert (first[:, 0] * first[:, 1]).sum(dim=1).max() < 0.95  # the states differ


def test_a_copied_text_encoder_folder_gives_the_same_embedding(text_encoder: SentenceEncoder, tmp_path: Path):
    shutil.copytree(packaged_text_encoder(), tmp_path / "own model")
    own = SentenceEncoder(tmp_path / "own model")
    assert torch.equal(own.encode(["a lawn"]), text_encoder.encode(["a lawn"]))


def test_a_folder_that_is_no_text_encoder_is_named(tmp_path: Path):
    with pytest.raises(HpcmmError, match=r"has no config\.json"):
        SentenceEncoder(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(HpcmmError, match="gives no hidden_size"):
        SentenceEncoder(tmp_path)
    config.write_text(json.dumps({"hidden_size": 8, "model_type": "bert"}))
    with pytest.raises(HpcmmError, match="cannot be loaded"):
        SentenceEncoder(tmp_path).encode(["a lawn"])


def test_the_normalisation_suits_the_packaged_weights():
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(read_state_dict(packaged_weights()))
    photograph = read_image(Path(skimage.__file__).parent / "data" / "coffee.png", 224)
    with torch.no_grad():
        probabilities = network(torch.from_numpy(normalise(photograph))[None]).softmax(dim=1)[0]
    assert probabilities[967] > 0.5  # ImageNet's espresso
