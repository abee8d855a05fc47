"""CLIP, ViT and ImageBind encoders: maps of the networks' own, from local files alone; bad files are named."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import imagebind_file
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, ViTConfig, ViTForImageClassification

from hpcmm.config.compose import compose_run
from hpcmm.config.parts import import_class, options_of, own_folders, part_name, resolved_part
from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models import build_model
from hpcmm.workloads.anomaly.models.image_encoders import ImageEncoder, build_image_encoder
from hpcmm.workloads.anomaly.models.image_encoders.tokens import choose_taps
from hpcmm.workloads.anomaly.models.imagebind import load_text_tower, load_vision_tower
from hpcmm.workloads.anomaly.models.text_encoders import TextEncoder, build_text_encoder
from hpcmm.workloads.anomaly.pixels import CHANNEL_MEAN, CHANNEL_STD
from hpcmm.workloads.anomaly.schema import ModelConfig

IMAGE_ENCODERS = options_of("model/image_encoder", own_folders())
TEXT_ENCODERS = options_of("model/text_tower", own_folders())
TINY = ("clip_tiny", "vit_tiny", "imagebind_tiny")
WORDS = ["a", "photo", "of", "grass", "wall"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP in transformers' layout, with the tokenizer's files."""
    folder = tmp_path_factory.mktemp("clip")
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 60,
        "bos_token_id": 58,
        "eos_token_id": 59,
        "pad_token_id": 59,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    write_tokenizer(folder, start=58, end=59)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT classifier in transformers' layout."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    scale = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(scale))
    return folder


@pytest.fixture
def imagebind(tmp_path: Path) -> Path:
    """A small file in ImageBind's layout, with the tokenizer's files beside it."""
    torch.save(imagebind_file.checkpoint(), tmp_path / "imagebind_huge.pth")
    write_tokenizer(tmp_path, start=imagebind_file.VOCABULARY - 2, end=imagebind_file.VOCABULARY - 1)
    return tmp_path / "imagebind_huge.pth"


def write_tokenizer(folder: Path, start: int, end: int) -> None:
    """CLIP's kind of tokenizer for WORDS; other words become the end token."""
    vocabulary = {f"{word}</w>": number + 1 for number, word in enumerate(WORDS)}
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary |= {letter: 10 + number for number, letter in enumerate(letters)}
    vocabulary |= {f"{letter}</w>": 30 + number for number, letter in enumerate(letters) if letter != "a"}
    vocabulary |= {"<|startoftext|>": start, "<|endoftext|>": end}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


def values(side: int) -> Tensor:
    """Two images with values from 0 to 1."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def as_items(images: Tensor) -> Tensor:
    """Images as the data sets give them."""
    return (images - CHANNEL_MEAN) / CHANNEL_STD


def grids(tokens: Tensor, side: int) -> Tensor:
    """Tokens (B, 1 + side^2, C) as maps, written place by place."""
    maps = torch.empty(len(tokens), tokens.shape[2], side, side)
    for row in range(side):
        for column in range(side):
            maps[:, :, row, column] = tokens[:, 1 + row * side + column]
    return maps


def test_clip_gives_its_own_blocks_patches(clip_folder: Path):
    encoder = build_image_encoder(ModelConfig(image_encoder="clip", image_weights=str(clip_folder), image_taps=[0, 5]))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(
        values(32), do_rescale=False, do_resize=False, do_center_crop=False, return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states
    for ours, tokens in zip(encoder(as_items(values(32))), (hidden[1], hidden[6]), strict=True):
        torch.testing.assert_close(ours, grids(tokens, 4), atol=1e-5, rtol=1e-4)


def test_clips_images_and_texts_share_one_space(clip_folder: Path):
    config = ModelConfig(image_encoder="clip", text_tower="clip", image_weights=str(clip_folder))
    image, text = build_image_encoder(config), build_text_encoder(config)
    sentences = ["a photo of grass", "a wall"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(
        values(32), do_rescale=False, do_resize=False, do_center_crop=False, return_tensors="pt"
    )["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(sentences, padding=True, return_tensors="pt")
    assert tokens["input_ids"][:, 0].tolist() == [58, 58]
    assert tokens["input_ids"][1, -1] == 59
    with torch.no_grad():
        theirs = model(pixel_values=pixels, **tokens)
    assert image.embedding_width == text.width == 40
    torch.testing.assert_close(image.embed(as_items(values(32))), theirs.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text.encode(sentences), theirs.text_embeds, atol=1e-5, rtol=1e-4)


def test_vit_takes_its_folders_pixel_scale(vit_folder: Path):
    encoder = build_image_encoder(ModelConfig(image_encoder="vit", image_weights=str(vit_folder), image_taps=[1, 4]))
    model = ViTForImageClassification.from_pretrained(vit_folder).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    pixels = (values(32) - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states
    for ours, tokens in zip(encoder(as_items(values(32))), (hidden[2], hidden[5]), strict=True):
        torch.testing.assert_close(ours, grids(tokens, 4), atol=1e-5, rtol=1e-4)
    with pytest.raises(HpcmmError, match="ViT embeds no whole image"):
        encoder.embed(values(32))


def test_imagebind_gives_what_its_layout_means(imagebind: Path):
    config = ModelConfig(image_encoder="imagebind", image_weights=str(imagebind), image_taps=[0, 4])
    encoder = build_image_encoder(config)
    side = imagebind_file.PATCH * imagebind_file.GRID
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (encoder.mean, encoder.std))
    states, embedding = imagebind_file.vision(imagebind_file.checkpoint(), (values(side) - mean) / std)
    for ours, tokens in zip(encoder(as_items(values(side))), (states[0], states[4]), strict=True):
        torch.testing.assert_close(ours, grids(tokens, imagebind_file.GRID), atol=1e-3, rtol=1e-3)
    unit = embedding / embedding.norm(dim=1, keepdim=True)
    torch.testing.assert_close(encoder.embed(as_items(values(side))), unit, atol=1e-5, rtol=1e-4)


def test_imagebinds_text_ends_at_its_end_token(imagebind: Path):
    tower = load_text_tower(imagebind)
    numbers = torch.tensor([[48, 3, 4, 49, 0, 0], [48, 5, 6, 7, 8, 49]])
    padded = torch.cat([numbers, torch.zeros(2, imagebind_file.LONGEST - 6, dtype=torch.int64)], dim=1)
    theirs = imagebind_file.text(imagebind_file.checkpoint(), padded)
    torch.testing.assert_close(tower(numbers), theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tower(padded), theirs, atol=1e-5, rtol=1e-4)


def test_imagebinds_texts_and_images_share_one_space(imagebind: Path):
    config = ModelConfig(image_encoder="imagebind", text_tower="imagebind", image_weights=str(imagebind))
    text = build_text_encoder(config)
    assert text.width == build_image_encoder(config).embedding_width == imagebind_file.JOINT
    vectors = text.encode(["a wall", "grass of a wall of grass of a wall of grass"])  # longer than the tower takes
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(text.encode(["a wall"])[0], vectors[0], atol=1e-5, rtol=1e-4)


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("modality_preprocessors.vision.cls_token"), r"has no tensor modality_preprocessors\.vision\.cls_token"),
        (drop("modality_trunks.vision.blocks.2.mlp.fc1.bias"), r"lacks blocks\.2\.mlp\.fc1\.bias"),
        (
            lambda s: s.update({"modality_trunks.vision.blocks.0.gamma": torch.ones(1)}),
            r"has the unknown blocks\.0\.gamma",
        ),
        (
            lambda s: s.update({"modality_heads.vision.0.weight": torch.ones(3)}),
            r"another shape for head_norm\.weight",
        ),
        (
            lambda s: s.update({"modality_preprocessors.vision.rgbt_stem.proj.1.weight": torch.ones(3)}),
            r"patches\.weight has the shape \(3,\), not 4 dimensions",
        ),
        (
            lambda s: s.update({"modality_preprocessors.vision.pos_embedding_helper.pos_embed": torch.ones(1, 9, 64)}),
            "8 position embeddings, which make no square",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("modality_trunks.vision.blocks")],
            r"has no tensor modality_trunks\.vision\.blocks\.\.\.\.",
        ),
    ],
)
def test_a_file_of_another_layout_is_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str):
    state = imagebind_file.checkpoint()
    change(state)
    torch.save(state, tmp_path / "imagebind_huge.pth")
    with pytest.raises(HpcmmError, match=said):
        load_vision_tower(tmp_path / "imagebind_huge.pth")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("side", [64, 96])
def test_maps_have_the_promised_channels_and_strides(name: str, side: int):
    encoder = build_image_encoder(ModelConfig(image_encoder=name))
    maps = encoder(as_items(values(side)))
    promised = [(2, c, side // s, side // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(each.shape) for each in maps] == promised
    assert len(maps) == 4
    assert not any(each.requires_grad for each in maps)


@pytest.mark.parametrize("name", TINY)
def test_other_sides_are_interpolated_and_odd_ones_refused(name: str):
    encoder = build_image_encoder(ModelConfig(image_encoder=name))
    image = torch.zeros(1, 3, 64, 64)
    larger = torch.zeros(1, 3, 128, 128)
    small, large = encoder(image)[0], encoder(larger)[0]
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert torch.nn.functional.cosine_similarity(shrunk, small, dim=1).mean() > 0.8  # the same places, finer
    with pytest.raises(HpcmmError, match=r"multiples of 8 pixels, not 60 x 64; change data\.image_size"):
        encoder(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_trains_all_that_its_maps_depend_on(name: str):
    config = ModelConfig(
        image_encoder=name,
        text_tower=name if name in TEXT_ENCODERS else "sentence",
        freeze_image_encoder=False,
        decoder_width=32,
        text_adapter_width=32,
    )
    model = build_model(config, seed=1).train()
    logits = model(as_items(values(64)), ["a lawn", "a wall"])
    assert logits.shape == (2, 2, 64, 64)
    logits[:, 1].square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [name for name in without if "k_proj.bias" not in name]  # a key's bias shifts all scores alike
    again = build_model(config, seed=1)
    assert torch.equal(again(as_items(values(64)), ["a lawn", "a wall"]), logits)


def test_an_early_last_tap_leaves_the_later_blocks_untrained():
    encoder = build_image_encoder(ModelConfig(image_encoder="clip_tiny", image_taps=[0, 1], freeze_image_encoder=False))
    sum(each.square().mean() for each in encoder(as_items(values(64)))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())


def test_taps_are_evenly_spread_and_checked():
    assert choose_taps([], 32) == (7, 15, 23, 31)  # ImageBind's, in AnomalyGPT
    assert choose_taps([], 12) == (2, 5, 8, 11)
    assert choose_taps([], 2) == (0, 1)
    for wrong in ([32], [-1], [3, 3], [5, 2]):
        with pytest.raises(HpcmmError, match=r"model\.image_taps is .* from 0 to 31"):
            choose_taps(wrong, 32)
    with pytest.raises(HpcmmError, match="its four strides"):
        build_image_encoder(ModelConfig(image_taps=[1]))


@pytest.mark.parametrize("name", ["clip", "vit", "imagebind"])
def test_weights_that_lack_are_asked_for(name: str, tmp_path: Path):
    with pytest.raises(HpcmmError, match=rf"model\.image_weights is not given.*model={name}_tiny"):
        build_image_encoder(ModelConfig(image_encoder=name))
    with pytest.raises(HpcmmError, match="nowhere"):
        build_image_encoder(ModelConfig(image_encoder=name, image_weights=str(tmp_path / "nowhere")))


def test_folders_that_cannot_be_used_are_named(clip_folder: Path, vit_folder: Path, tmp_path: Path):
    def refused(folder: Path, said: str) -> None:
        with pytest.raises(HpcmmError, match=said):
            build_image_encoder(ModelConfig(image_encoder="clip", image_weights=str(folder)))

    refused(vit_folder, "type 'vit', but model.image_weights must name a CLIP")
    copy = tmp_path / "copy"
    shutil.copytree(clip_folder, copy)
    state = load_file(copy / "model.safetensors")
    save_file({name: value for name, value in state.items() if "visual_projection" not in name}, copy / "less")
    (copy / "less").replace(copy / "model.safetensors")
    refused(copy, r"they lack visual_projection\.weight")
    (copy / "model.safetensors").write_bytes(b"no tensors")
    refused(copy, "cannot be loaded")
    torch.save(state, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(copy, r"has no model\.safetensors: .* pickles")
    (copy / "config.json").unlink()
    refused(copy, r"has no config\.json")


def test_a_missing_tokenizer_is_asked_for(imagebind: Path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (imagebind.parent / name).unlink()
    with pytest.raises(HpcmmError, match="tokenizer of ImageBind"):
        build_text_encoder(ModelConfig(text_tower="imagebind", image_weights=str(imagebind)))


@pytest.mark.parametrize("name", sorted(set(TEXT_ENCODERS) - {"sentence", "clip", "imagebind"}))
def test_tiny_text_towers_tell_sentences_apart(name: str):
    text = build_text_encoder(ModelConfig(text_tower=name))
    vectors = text.encode(["a lawn", "a damaged lawn", "a" * 500])
    assert vectors.shape == (3, text.width)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    torch.testing.assert_close(text.encode(["a lawn"])[0], vectors[0], atol=1e-5, rtol=1e-4)  # without padding


@pytest.mark.parametrize(
    ("group", "parameters"),
    [("model/image_encoder", ["weights", "taps", "frozen"]), ("model/text_tower", ["folder", "image_weights"])],
)
def test_each_class_is_built_from_plain_values(group: str, parameters: list[str]):
    for name in options_of(group, own_folders()):
        encoder = import_class(resolved_part(name, group, own_folders())["_target_"])
        assert list(inspect.signature(encoder).parameters) == parameters


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("clip_tiny", "tower"),
        ("vit_tiny", "network"),
        ("imagebind_tiny", "tower"),
        ("efficientnet_lite0", "stem blocks"),
    ],
)
def test_the_parts_keep_the_names_that_checkpoints_hold(name: str, part: str):
    encoder = build_image_encoder(ModelConfig(image_encoder=name))
    assert {key.partition(".")[0] for key in encoder.state_dict()} == set(part.split())


def test_a_text_tower_takes_its_files_from_beside_the_image_encoder_s_or_its_own_folder(
    clip_folder, imagebind, tmp_path
):
    for name, weights in (("clip", clip_folder), ("imagebind", imagebind)):
        beside = build_text_encoder(ModelConfig(text_tower=name, image_weights=str(weights)))
        own = tmp_path / name
        shutil.copytree(clip_folder if name == "clip" else imagebind.parent, own)
        apart = build_text_encoder(ModelConfig(text_tower=name, image_weights=str(weights), text_encoder=str(own)))
        assert torch.equal(beside.encode(["a lawn"]), apart.encode(["a lawn"]))
        with pytest.raises(HpcmmError, match=rf"image_weights is not given.* {name}'s weights.*model={name}_tiny"):
            build_text_encoder(ModelConfig(text_tower=name))


def test_every_encoder_has_its_yaml():
    groups = Path(__file__).parents[4] / "conf" / "model"
    own = {path.stem for path in groups.glob("*.yaml") if "image_encoder" in path.read_text(encoding="utf-8")}
    assert own >= set(IMAGE_ENCODERS)
    for name in own:
        config = compose_run([f"model={name}", "model.image_weights=/somewhere"]).model
        assert part_name(config.image_encoder) in IMAGE_ENCODERS
        assert part_name(config.text_tower) in TEXT_ENCODERS


def test_each_name_is_a_class_of_its_group():
    for group, names, base in (
        ("model/image_encoder", IMAGE_ENCODERS, ImageEncoder),
        ("model/text_tower", TEXT_ENCODERS, TextEncoder),
    ):
        assert len(names) >= 5
        for name in names:
            assert issubclass(import_class(resolved_part(name, group, own_folders())["_target_"]), base)
