"""A dictionary of parts: each under a name of the user's, chosen, changed, added and left out by overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump, load
from hpcmm.config.parts import targets_of
from hpcmm.config.sweep import compose_points
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError

OWN_MODALITY = '''\
from hpcmm.workloads.omni.models.modalities.image import TinyImageModality


class Frames(TinyImageModality):
    """Pictures one after another."""

    def __init__(self, width: int, *, every: int = 2) -> None:
        super().__init__(width)
'''
TINY_IMAGE = "hpcmm.workloads.omni.models.modalities.image.TinyImageModality"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's with a package and a config folder."""
    (tmp_path / "own_frames.py").write_text(OWN_MODALITY)
    options = tmp_path / "conf" / "model" / "modality"
    options.mkdir(parents=True)
    (options / "frames.yaml").write_text("_target_: own_frames.Frames\nevery: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def modalities(*overrides: str):
    config = compose_run(["task=omni", "cluster=local", *overrides])
    validate(config)
    return config.model.modalities


def test_an_entry_is_chosen_by_a_name_or_as_a_group():
    as_value = modalities("model.modalities.image=sound_tiny")
    as_group = modalities("model/modality@model.modalities.image=sound_tiny")
    assert as_value == as_group
    assert as_value["image"]["name"] == "sound_tiny"
    assert as_value["sound"] == modalities()["sound"]


def test_a_parameter_of_an_entry_is_an_override():
    found = modalities("model.modalities.image.merge=1", "model.modalities.sound=null")
    assert found == {"image": {"_target_": TINY_IMAGE, "name": "image_tiny", "merge": 1}, "sound": None}


def test_an_entry_of_a_users_own_is_added_without_an_edit(own: Path):
    found = modalities("launch.config_dir=conf", "model.modalities.video=frames", "model.modalities.video.every=4")
    assert found["video"] == {"_target_": "own_frames.Frames", "every": 4, "name": "frames"}
    assert set(found) == {"image", "sound", "video"}


def test_the_classes_of_a_dictionary_are_among_those_that_a_run_names(own: Path):
    config = compose_run(["task=omni", "cluster=local", "launch.config_dir=conf", "model.modalities.video=frames"])
    assert "own_frames.Frames" in set(targets_of(config))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.modalities.video=film", "model.modalities.video is 'film', but hpcmm has image, image_tiny, sound"),
        ("model.modalities.image.layers=many", "model.modalities.image.layers is 'many', but TinyImageModality takes"),
        ("model.modalities.image.colour=1", "model.modalities.image.colour is not a parameter of TinyImageModality"),
        ("model.modalities.image.width=3", "model.modalities.image.width cannot be given: the workload sets it."),
        (
            "model.modalities.image._target_=hpcmm.workloads.anomaly.models.decoders.mlp.MlpDecoder",
            "which is not a Modality",
        ),
        ("model.modalities.image=image", "or take a small random one with model.modalities.image=image_tiny"),
        ("model.modalities.text=image_tiny", "model.modalities.text: a modality is called by"),
    ],
)
def test_a_wrong_entry_is_named(override: str, said: str):
    with pytest.raises(HpcmmError) as error:
        modalities(override)
    assert said in str(error.value)


def test_a_sweep_over_an_entry_resolves_each_point():
    points = compose_points(["task=omni", "cluster=local_slurm", "model.modalities.image=image_tiny,sound_tiny"])
    assert [point.config.model.modalities["image"]["name"] for point in points] == ["image_tiny", "sound_tiny"]


def test_a_frozen_run_has_the_same_dictionary(own: Path):
    config = compose_run(["task=omni", "cluster=local", "launch.config_dir=conf", "model.modalities.video=frames"])
    dump(config, own / "config.yaml")
    assert load(own / "config.yaml").model.modalities == config.model.modalities
