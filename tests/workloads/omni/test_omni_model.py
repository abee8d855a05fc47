"""The omni-modal model: packing, modalities, frozen parts, each architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_omni import IMAGE, SOUND, random_batch, random_example, tiny_model

from hpcmm.train.structure import NO_LABEL
from hpcmm.workloads.omni.data.batch import Batch, pack
from hpcmm.workloads.omni.models import OmniModel
from hpcmm.workloads.tiny_lm import ARCHITECTURES

KINDS = [("image", "sound", "image"), (), ("sound",), ("image",)]


def gradients(model: OmniModel, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor], list[bool]]:
    """Loss summed over ``batches``, its gradients, and which tokens were foretold."""
    model.zero_grad()
    total, correct = 0.0, []
    for batch in batches:
        loss = model(batch)
        loss.total.backward()
        total += float(loss.total.detach())
        correct += loss.correct.tolist()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return total, grads, correct


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_examples_give_what_one_at_a_time_gives(architecture: str):
    model = tiny_model(architecture)
    rng = np.random.default_rng(1)
    examples = [random_example(model, rng, things) for things in KINDS]
    together, own = gradients(model, [pack(examples)]), gradients(model, examples)
    assert together[0] == pytest.approx(own[0], rel=1e-5)
    assert together[2] == own[2]
    assert together[1].keys() == own[1].keys()
    for name, value in own[1].items():
        torch.testing.assert_close(together[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_the_one_that_the_network_itself_gives_an_example(architecture: str):
    model = tiny_model(architecture)
    example = random_example(model, np.random.default_rng(0), ["image"])
    found = model(example)
    network = model.trunk.lm
    embedded, _, labels = model.embed(example)
    network.set_attn_implementation("sdpa")
    wanted = network(inputs_embeds=embedded, shift_labels=labels, labels=labels)
    count = int((labels != NO_LABEL).sum())
    assert float(found.total.detach()) / count == pytest.approx(float(wanted.loss.detach()), rel=1e-5)
    assert len(found.correct) == count


def test_experts_that_are_chosen_unevenly_cost_something():
    model = tiny_model("mixtral", router_loss=True)
    batch = random_batch(model)
    with_router = float(model(batch).total.detach())
    with torch.no_grad():
        scored = float(model(batch).total)
    assert scored < with_router


def test_a_batch_without_a_modality_gives_its_parameters_gradients_of_zero():
    model = tiny_model()
    batch = random_batch(model, things=[["image"], []])
    assert not batch.modalities["sound"].prepared
    _, grads, _ = gradients(model, [batch])
    assert all(
        not grads[f"modalities.sound.{name}"].any()
        for name, each in model.modalities["sound"].named_parameters()
        if each.requires_grad
    )
    assert grads["modalities.image.connector.norm.weight"].any()


def test_every_trained_parameter_has_a_gradient():
    model = tiny_model("qwen3")
    _, grads, _ = gradients(model, [random_batch(model)])
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == grads.keys()


def test_frozen_parts_stay_and_do_not_drop_out():
    frozen = {"image": {**IMAGE, "frozen": True}, "sound": {**SOUND, "frozen": True, "connector_frozen": True}}
    model = tiny_model(modalities=frozen, language={"frozen": True}).train()
    _, grads, _ = gradients(model, [random_batch(model)])
    assert {name.rsplit(".", 2)[0] for name in grads} <= {
        "modalities.image.connector",
        "modalities.image.connector.map",
    }
    assert not model.modalities["image"].encoder.training
    assert model.modalities["image"].connector.training


def test_low_rank_updates_train_beside_a_frozen_network():
    model = tiny_model(modalities={}, language={"frozen": True, "lora_rank": 2})
    _, grads, _ = gradients(model, [random_batch(model, things=[[], []])])
    assert grads
    assert all(".lora_" in name for name in grads)


def test_a_model_loads_by_its_names_and_a_tied_output_map_is_saved_once():
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    state = model.state_dict()
    assert "trunk.lm.lm_head.weight" not in state
    assert state.keys() == {name for name, _ in model.named_parameters()}
    other.load_state_dict(state, strict=False)
    batch = random_batch(model)
    assert float(other(batch).total.detach()) == float(model(batch).total.detach())


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = tiny_model(seed=3).state_dict()
    torch.manual_seed(6)
    second = tiny_model(seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "modalities.image.connector.map.0.weight"
    assert not torch.equal(first[name], tiny_model(seed=4).state_dict()[name])


def test_tokens_begin_as_large_as_those_of_words():
    model = tiny_model()
    batch = random_batch(model)
    row = model.embed(batch)[0][0]
    words = float(model.trunk.lm.get_input_embeddings().weight.detach().square().mean().sqrt())
    image = row[batch.modalities["image"].places]
    assert float(image.square().mean().sqrt().detach()) == pytest.approx(words, rel=0.05)


@pytest.mark.parametrize("key", ["image", "sound"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_another_image_or_sound_changes_a_random_model_s_answer(architecture: str, key: str):
    model = tiny_model(architecture).eval()
    batch = random_batch(model, things=[[key]])
    part = batch.modalities[key]
    one, other = (
        answering_states(model, replace(batch, modalities={**batch.modalities, key: replace(part, prepared=prepared)}))
        for prepared in (part.prepared, [each.flip(-1) for each in part.prepared])
    )
    assert float((one - other).norm() / one.norm()) > 0.03


@torch.no_grad()
def answering_states(model: OmniModel, batch: Batch) -> torch.Tensor:
    """The last hidden states (labels, width) that the answers' tokens are foretold from."""
    embedded, positions, labels = model.embed(batch)
    network = model.trunk.lm.model
    states = network(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
    return states[labels != NO_LABEL]


def test_a_few_steps_learn_a_batch():
    model = tiny_model()
    batch = random_batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = float(model(batch).total.detach())
    for _ in range(30):
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()
    assert float(model(batch).total.detach()) < 0.2 * first
    assert model(batch).correct.all()
