"""The four decoders: shapes, what a place sees, gradients everywhere, batch statistics in 16 bits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from hpcmm.config.parts import import_class, options_of, own_folders, resolved_part
from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.models.decoders import build_decoder
from hpcmm.workloads.anomaly.models.decoders.batch_norm import Float32BatchNorm2d
from hpcmm.workloads.anomaly.models.decoders.decoder import Decoder

CHANNELS = (24, 40, 16)
DECODERS = options_of("model/decoder", own_folders())


@pytest.fixture
def features() -> list[torch.Tensor]:
    """Maps of 16, 8 and 4 places a side, whose scales differ as a network's do."""
    generator = torch.Generator().manual_seed(0)
    return [
        10.0**level * torch.randn(2, channels, 16 >> level, 16 >> level, generator=generator)
        for level, channels in enumerate(CHANNELS)
    ]


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_patch_embeddings_lie_on_the_finest_grid(name: str, features: list[torch.Tensor]):
    decoder = build_decoder(name, CHANNELS, 32)
    patches = decoder(features)
    assert patches.shape == (2, 32, 16, 16)
    patches.square().mean().backward()
    for parameter, value in decoder.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.abs().max() > 0, parameter


@pytest.mark.parametrize(("name", "local"), [("mlp", True), ("mlp_bn", True), ("resnet", False), ("fcn", False)])
def test_only_the_perceptrons_judge_each_place_of_the_finest_map_by_itself(
    name: str, local: bool, features: list[torch.Tensor]
):
    torch.manual_seed(0)
    decoder = build_decoder(name, CHANNELS, 32).eval()
    changed = [features[0].clone(), *features[1:]]
    changed[0][:, :, 5, 5] += 3.0
    difference = (decoder(changed) - decoder(features)).abs().amax(dim=(0, 1))
    assert difference[5, 5] > 1e-4
    difference[5, 5] = 0.0
    assert bool(difference.max() < 1e-6) is local


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_each_name_is_a_decoder_s_class_whose_parameters_are_what_the_docstring_says(name: str):
    decoder = import_class(resolved_part(name, "model/decoder", own_folders())["_target_"])
    assert issubclass(decoder, Decoder)
    first, second, *more = list(inspect.signature(decoder).parameters.values())
    assert (first.name, second.name) == ("channels", "width")
    assert all(each.default is not inspect.Parameter.empty for each in more)


PARTS = {
    "fcn": {"coarsest", "stages", "head"},
    "mlp": {"layers"},
    "mlp_bn": {"layers"},
    "resnet": {"reduce", "blocks", "head"},
}
"""Checkpoints hold these names."""


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_the_parts_keep_the_names_that_checkpoints_hold(name: str):
    assert {key.partition(".")[0] for key in build_decoder(name, CHANNELS, 32).state_dict()} == PARTS[name]


def test_an_unknown_decoder_names_the_valid_ones():
    with pytest.raises(HpcmmError, match="fcn, mlp, mlp_bn, resnet"):
        build_decoder("unet", CHANNELS, 32)


def test_batch_statistics_stay_float32_in_a_bfloat16_network():
    torch.manual_seed(0)
    exact, half = Float32BatchNorm2d(4), Float32BatchNorm2d(4).bfloat16()
    plain = torch.nn.BatchNorm2d(4)
    assert half.weight.dtype is torch.bfloat16
    assert half.running_var.dtype is torch.float32
    for _ in range(300):
        batch = (5 + 0.1 * torch.randn(3, 4, 6, 6)).bfloat16()
        exact(batch.float())
        plain(batch.float())
        assert half(batch).dtype is torch.bfloat16
    torch.testing.assert_close(exact.running_mean, plain.running_mean)
    torch.testing.assert_close(exact.running_var, plain.running_var)
    torch.testing.assert_close(half.running_mean, exact.running_mean)
    torch.testing.assert_close(half.running_var, exact.running_var)
    assert int(half.num_batches_tracked) == 300


def test_batch_normalisation_equals_torchs_in_training_and_evaluation():
    ours, theirs = Float32BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    inputs = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(ours(inputs), theirs(inputs))
    again = copy.deepcopy(ours).eval()
    torch.testing.assert_close(again(inputs), theirs.eval()(inputs))
