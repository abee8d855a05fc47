"""Language models from local folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_omni import random_batch, tiny_config, tiny_model

from hpcmm.errors import HpcmmError
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
    with pytest.raises(HpcmmError, match="cannot be loaded"):
        build_model(of_folder(tmp_path))


def test_low_rank_updates_on_maps_that_are_not_there_are_refused(tmp_path: Path):
    with pytest.raises(HpcmmError, match=r"model\.language_model\.lora_targets=\['query'\] does not fit"):
        tiny_model(language={"lora_rank": 2, "lora_targets": ["query"]})
