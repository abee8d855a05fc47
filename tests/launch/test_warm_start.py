"""``train.init_from`` names a run that is there, and the ranks read its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hpcmm.config.compose import compose_run
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.launch.plan import _compare_with_start, run_to_start_from
from hpcmm.runs.run_dir import RunDir
from hpcmm.workloads.anomaly.schema import AnomalyConfig, AnomalyTrainConfig


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "decoder-1").mkdir(parents=True)
    (tmp_path / "runs" / "decoder-1" / "config.yaml").write_text("name: decoder\n")
    (tmp_path / "runs" / "decoder-1" / "checkpoints").mkdir()
    (tmp_path / "runs" / "decoder-1" / "checkpoints" / "latest").write_text("step_000010")
    (tmp_path / "runs" / "latest").symlink_to("decoder-1")
    return tmp_path / "runs"


def config_of(named: str | None, runs: Path, after: str | None = None) -> RunConfig:
    config = AnomalyConfig(name="words", runs_root=str(runs), after=after)
    return replace(config, train=AnomalyTrainConfig(init_from=named))


def starting_from(named: str | None, runs: Path, after: str | None = None) -> str | None:
    return run_to_start_from(config_of(named, runs, after))


def test_a_run_is_found_by_name_by_link_and_by_folder(runs: Path, monkeypatch: pytest.MonkeyPatch):
    folder = str((runs / "decoder-1").resolve())
    assert starting_from(None, runs) is None
    assert starting_from("decoder-1", runs) == folder
    assert starting_from("latest", runs) == folder  # the link points to the new run itself a moment later
    assert starting_from(folder, runs) == folder
    monkeypatch.chdir(runs.parent)
    assert starting_from("runs/decoder-1", Path("elsewhere")) == folder


@pytest.mark.parametrize("named", ["decoder-2", "", "a\0b", "/"])
def test_a_run_that_is_not_there_is_refused(runs: Path, named: str):
    with pytest.raises(HpcmmError, match="neither"):
        starting_from(named, runs)


def test_a_run_without_a_finished_checkpoint_is_refused_unless_a_job_may_bring_one(runs: Path):
    (runs / "decoder-1" / "checkpoints" / "latest").unlink()
    with pytest.raises(HpcmmError, match=r"decoder-1/checkpoints holds no finished checkpoint: .* after=JOB"):
        starting_from("latest", runs)
    assert starting_from("latest", runs, after="12") == str((runs / "decoder-1").resolve())


def test_another_seed_whose_standins_are_others_is_noted(runs: Path, capsys: pytest.CaptureFixture[str]):
    config = config_of("decoder-1", runs)
    for frozen, said in [
        ("data: {root: null}\ntrain: {seed: 1}\n", "train.seed=1 and this run has 0"),
        ("data: {root: null}\ntrain: {seed: 0}\n", ""),
        ("data: {root: /data/mvtec}\ntrain: {seed: 1}\n", ""),
        ("name: decoder\n", ""),
    ]:
        (runs / "decoder-1" / "config.yaml").write_text(frozen)
        _compare_with_start(config, RunDir(runs / "decoder-1"), None)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == bool(said)
        assert said in "".join(lines)


@pytest.mark.parametrize(
    ("language", "given", "size"),
    [
        ("tiny: {width: 128}", [], "hidden_size is 128, but this run's is 64"),
        ("tiny: {width: 128}, frozen: true", [], "hidden_size is 128, but this run's is 64"),
        ("tiny: {kv_heads: 4}", [], "num_key_value_heads is 4, but this run's is 2"),
        ("tiny: {}", ["data.vocabulary=512"], "vocab_size is 1024, but this run's is 512"),
        ("tiny: {layers: 1}", [], ""),
        ("tiny: {intermediate: 256}, frozen: true", [], ""),
    ],
)
def test_weights_of_another_size_are_refused_before_the_job(runs: Path, language: str, given: list[str], size: str):
    config = compose_run(["task=omni", "cluster=local", *given])
    sizes = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "intermediate": 128, "experts": 4}
    sizes |= {"experts_per_token": 2, "router_loss": False}
    earlier = {"kind": "tiny", "architecture": "llama", "frozen": False} | yaml.safe_load(f"{{{language}}}")
    earlier["tiny"] = sizes | earlier["tiny"]
    model = {"model": {"language_model": earlier}, "data": {"vocabulary": 1024}}
    (runs / "decoder-1" / "config.yaml").write_text(yaml.safe_dump(model))
    if not size:
        _compare_with_start(config, RunDir(runs / "decoder-1"), None)
        return
    with pytest.raises(HpcmmError) as refused:
        _compare_with_start(config, RunDir(runs / "decoder-1"), None)
    assert f"decoder-1 has a language model whose {size}, so that the weights do not fit" in str(refused.value)


@pytest.mark.parametrize("model", ["1", "[]", "{language_model: 3}", "{language_model: {kind: tiny, tiny: [1]}}"])
def test_an_earlier_configuration_that_tells_no_sizes_refuses_nothing(runs: Path, model: str):
    (runs / "decoder-1" / "config.yaml").write_text(f"model: {model}\n")
    _compare_with_start(compose_run(["task=omni", "cluster=local"]), RunDir(runs / "decoder-1"), None)
