"""Language models from local folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_omni import random_batch, tiny_config, tiny_model

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.train.attention import NAME as ATTENTION
from hpcmm.workloads.omni.models import build_model
from hpcmm.workloads.omni.schema import ARCHITECTURES, LanguageModelConfig, LanguageModelKind, ModelConfig
from hpcmm.workloads.tiny_lm import bytes_tokenizer


def of_folder(folder: Path, **keys: object) -> ModelConfig:
    language = LanguageModelConfig(kind=LanguageModelKind.folder, path=str(folder), **keys)  # type: ignore[arg-type]
    return ModelConfig(language, tiny_config().modalities)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_of_each_architecture_gives_the_loss_of_the_network_that_was_saved(tmp_path: Path, architecture: str):
    made = tiny_model(architecture)
    made.trunk.lm.save_pretrained(tmp_path)
    bytes_tokenizer().save_pretrained(tmp_path)
    read = build_model(of_folder(tmp_path))
    read.modalities.load_state_dict(made.modalities.state_dict())
    batch = random_batch(made)
    with torch.no_grad():
        torch.testing.assert_close(read(batch).total, made(batch).total)


def test_a_folder_of_another_architecture_or_with_code_of_its_own_is_refused(tmp_path: Path):
    made = tiny_model()
    made.trunk.lm.save_pretrained(tmp_path)
    bytes_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    with pytest.raises(HpcmmError, match=r"of type gpt2, but model\.language_model\.path takes llama, mixtral"):
        build_model(of_folder(tmp_path))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": own}))
    with pytest.raises(HpcmmError, match="of type own"):
        build_model(of_folder(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "auto_map": own}))
    build_model(of_folder(tmp_path))


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["query"], "nothing is called query"),
        (["q_proj", "key"], "nothing is called key"),
        (["self_attn"], "it has a part that gets no update"),
    ],
)
def test_low_rank_updates_on_maps_that_are_not_there_are_refused(targets: list[str], reason: str):
    with pytest.raises(HpcmmError) as refused:
        tiny_model(language={"lora_rank": 2, "lora_targets": targets})
    assert f"model.language_model.lora_targets={targets} does not fit: {reason}; name maps of" in str(refused.value)
    assert str(refused.value).endswith("k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.")


def saved(folder: Path, **sizes: int) -> Path:
    """A folder with a tiny network and a tokenizer of bytes."""
    tiny_model(**sizes).trunk.lm.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path):
    (saved(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(HpcmmError, match=r"has adapter_config\.json, so it holds an adapter"):
        build_model(of_folder(tmp_path))


def test_sizes_that_do_not_go_together_are_refused_with_their_reason(tmp_path: Path):
    change(saved(tmp_path), num_attention_heads=5)
    with pytest.raises(
        HpcmmError, match=r"hidden size \(64\) is not a multiple of the number of attention heads \(5\)"
    ):
        build_model(of_folder(tmp_path))


def change(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"intermediate_size": 96}, r"mlp\.down_proj\.weight is of the shape \(64, 128\), not \(64, 96\)\.$"),
        ({"num_hidden_layers": 3}, r"they lack model\.layers\.2\.input_layernorm\.weight and 8 more\.$"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights, which cannot train: name a folder"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path, settings: dict[str, object], said: str):
    change(saved(tmp_path), **settings)
    with pytest.raises(HpcmmError, match=said):
        build_model(of_folder(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    for file in saved(tmp_path).glob("*token*"):
        file.unlink()
    with pytest.raises(HpcmmError, match=r"must name a folder with tokenizer\.json, or vocab\.json and merges\.txt\.$"):
        build_model(of_folder(tmp_path))


def test_damaged_weights_are_refused_in_one_sentence(tmp_path: Path):
    weights = saved(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(HpcmmError, match=r"^The language model in .* cannot be loaded: [^\n]*$"):
        build_model(of_folder(tmp_path))


def refusal(folder: Path, *overrides: str) -> str:
    language = ["model/language_model=folder", f"model.language_model.path={folder}"]
    with pytest.raises(HpcmmError) as error:
        validate(compose_run(["task=omni", "cluster=local", *language, *overrides]))
    return str(error.value)


def test_another_type_of_model_is_refused_before_the_job(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    assert "a model of type phi3, but this workload takes llama, mixtral, qwen2, qwen3, qwen3_moe" in refusal(tmp_path)


@pytest.mark.parametrize(("modality", "takes"), [("image", "clip, clip_vision_model, siglip"), ("sound", "whisper")])
def test_an_encoder_of_another_type_is_refused_before_the_job(tmp_path: Path, modality: str, takes: str):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    refused = refusal(Path("/elsewhere"), "model=omni", f"model.modalities.{modality}.weights={tmp_path}")
    assert f"{modality}.weights is {tmp_path}, a model of type wav2vec2, but {modality} takes {takes}" in refused


@pytest.mark.parametrize(
    ("settings", "overrides", "expected"),
    [
        ({"router_jitter_noise": 0.1}, [], "config.json has router_jitter_noise, which"),
        ({"mlp_only_layers": [1, 0]}, [], "of whose layers none has experts"),
        ({"decoder_sparse_step": 3}, [], "of whose layers none has experts"),
        ({}, ["lora_rank=2", "lora_targets=[q_proj,mlp.gate]"], "lora_targets has gate, the router, whose updates"),
    ],
)
def test_what_divided_experts_leave_out_is_refused_before_the_job(
    tmp_path: Path, settings: dict[str, object], overrides: list[str], expected: str
):
    kind = {"model_type": "qwen3_moe", "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(kind | settings))
    given = [f"model.language_model.{override}" for override in overrides]
    assert expected in refusal(tmp_path, *given, "parallel=expert", "cluster.ranks_per_node=2")
    language = ["model/language_model=folder", f"model.language_model.path={tmp_path}"]
    validate(compose_run(["task=omni", "cluster=local", *language, *given]))
    (tmp_path / "config.json").write_text(json.dumps(kind | {"mlp_only_layers": [0], "decoder_sparse_step": 2}))
    validate(compose_run(["task=omni", "cluster=local", *language, "parallel=expert", "cluster.ranks_per_node=2"]))


def test_layers_without_experts_are_divided_as_those_of_other_networks(tmp_path: Path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 126, "moe_intermediate_size": 64, "vocab_size": 512, "num_experts": 4}
    kind = {"model_type": "qwen3_moe", **sizes}
    given = ["parallel=expert", "parallel.mesh={expert: 2, tensor: 4}", "cluster.ranks_per_node=8"]
    (tmp_path / "config.json").write_text(json.dumps(kind | {"mlp_only_layers": [0]}))
    assert "the language model's feed-forward networks are 126 wide" in refusal(tmp_path, *given)
    (tmp_path / "config.json").write_text(json.dumps(kind))
    language = ["model/language_model=folder", f"model.language_model.path={tmp_path}"]
    validate(compose_run(["task=omni", "cluster=local", *language, *given]))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff" * 3, "[" * 10_000])
def test_settings_that_are_no_json_are_refused_before_the_job(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    assert "whose config.json cannot be read as a JSON object: copy the folder anew" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.modalities.image.connector=mpl", "'mpl', but TinyImageModality takes 'linear' or 'mlp'."),
        (
            "model.modalities.image.architecture=resnet",
            "'resnet', but TinyImageModality takes 'clip' or",
        ),
        ("data.num_workers=100000", "data.num_workers is 100000"),
        ("optimizer.eps=nan", "optimizer.eps is nan, which is no number: give one, or leave it out."),
    ],
)
def test_values_that_nothing_takes_are_refused_before_the_job(setting: str, said: str):
    with pytest.raises(HpcmmError) as refused:
        validate(compose_run(["task=omni", "cluster=local", setting]))
    assert said in str(refused.value)


def test_sizes_that_no_network_has_are_refused_before_the_job(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": -1}))
    assert "whose config.json has num_hidden_layers -1: name another folder." in refusal(tmp_path)


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 100}},
    ],
)
def test_positions_that_depend_on_the_longest_of_a_row_bound_the_tokens(tmp_path: Path, rotary: dict[str, object]):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 100, **rotary}))
    assert "is longer than 100 tokens: set data.max_tokens=100." in refusal(tmp_path)
    language = ["model/language_model=folder", f"model.language_model.path={tmp_path}"]
    validate(compose_run(["task=omni", "cluster=local", *language, "data.max_tokens=100"]))


def test_a_folders_network_trains_from_the_first_step_on_by_hpcmms_attention(tmp_path: Path):
    change(saved(tmp_path), _attn_implementation="flash_attention_2")
    model = build_model(of_folder(tmp_path))
    assert model.trunk.lm.config._attn_implementation == ATTENTION
    assert all(module.training for module in model.trunk.modules())  # else neither dropout nor recomputing
