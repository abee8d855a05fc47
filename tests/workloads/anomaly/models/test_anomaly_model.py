"""The anomaly detector: shapes, what trains, seeds, scores of a map."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models import AnomalyModel, build_model
from hpcmm.workloads.anomaly.schema import ModelConfig

SMALL = ModelConfig(decoder_width=32, text_adapter_width=64)
CAPTIONS = ["a lawn", "a brick wall"]


def test_logits_have_two_classes_a_pixel(demo_model: AnomalyModel, images: torch.Tensor):
    logits = demo_model(images, CAPTIONS)
    assert (logits.shape, logits.dtype) == ((2, 2, 64, 64), torch.float32)
    assert logits.abs().max() <= 1 / ModelConfig().temperature + 1e-3


def test_an_image_is_judged_by_its_own_caption_alone(demo_model: AnomalyModel, images: torch.Tensor):
    together = demo_model(images, CAPTIONS)
    torch.testing.assert_close(demo_model(images[1:], CAPTIONS[1:]), together[1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(demo_model(images, ["a lawn", "a lawn"])[1], together[1])


def test_at_least_five_million_parameters_train(demo_model: AnomalyModel):
    trained = sum(parameter.numel() for parameter in demo_model.parameters() if parameter.requires_grad)
    assert trained >= 5_000_000


def test_training_changes_every_trained_tensor_and_nothing_frozen(images: torch.Tensor):
    model = build_model(SMALL).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images, CAPTIONS)[:, 1].mean().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(("decoder.", "text_adapter."))}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.decoder.modules())


def test_the_text_encoder_is_no_part_of_the_checkpoint(demo_model: AnomalyModel):
    assert {name.partition(".")[0] for name in demo_model.state_dict()} == {"image_encoder", "text_adapter", "decoder"}


def test_a_checkpoint_loads_into_a_model_of_another_seed(images: torch.Tensor):
    one, other = build_model(SMALL, seed=1), build_model(SMALL, seed=2)
    assert not torch.equal(one(images, CAPTIONS), other(images, CAPTIONS))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(images, CAPTIONS), other(images, CAPTIONS))


def digest_of_weights() -> str:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = build_model(SMALL, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def test_processes_start_from_the_same_weights_and_keep_their_random_state():
    code = f"from {__name__} import digest_of_weights as digest; print(digest())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert other.stdout.strip() == digest_of_weights()


def test_bfloat16_gives_nearly_the_same_map(images: torch.Tensor):
    full = build_model(SMALL)
    half = build_model(SMALL).bfloat16()
    logits = half(images, CAPTIONS)
    assert logits.dtype == torch.float32
    difference = (AnomalyModel.anomaly_map(full(images, CAPTIONS)) - AnomalyModel.anomaly_map(logits)).abs()
    assert difference.mean() < 0.05


def test_unknown_names_are_answered_with_the_valid_ones():
    with pytest.raises(HpcmmError, match=r"model/decoder=unet is not known; valid: fcn"):
        build_model(replace(SMALL, decoder="unet"))
    with pytest.raises(HpcmmError, match=r"model\.temperature must be above 0"):
        build_model(replace(SMALL, temperature=0.0))
    with pytest.raises(HpcmmError, match=r"model\.decoder_width must be a multiple of 32, not 40"):
        build_model(replace(SMALL, decoder_width=40))


def test_the_map_is_the_probability_of_abnormal():
    logits = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    torch.testing.assert_close(AnomalyModel.anomaly_map(logits), torch.sigmoid(torch.full((1, 8, 8), 2.0)))


def test_the_score_is_the_mean_of_the_highest_fiftieth():
    logits = torch.zeros(2, 2, 20, 20)  # 400 pixels: 8 of them count
    logits[1, 1, 3, :8] = 3.0
    logits[1, 1, 9, :4] = 1.0
    expected = torch.tensor([0.5, torch.sigmoid(torch.tensor(3.0)).item()])
    torch.testing.assert_close(AnomalyModel.score(logits), expected)
