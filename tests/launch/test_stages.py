"""A launch of stages: several runs one after the other, each from the weights of the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcmm.config.stages import compose_stages
from hpcmm.errors import HpcmmError
from hpcmm.launch import stages as launch_of_stages
from hpcmm.launch import submit as submitting
from hpcmm.launch import write as writing
from hpcmm.launch.stages import dry_run_of, launch_stages, plan_stages

TWO = ["stages.align=[train.steps=4]", "stages.tune=[train.steps=6,model/decoder=mlp]"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["cluster=local_slurm", "name=run", f"runs_root={tmp_path}/runs", "dry_run=true", *TWO]


@pytest.fixture
def local(here: list[str]) -> list[str]:
    return [word for word in here if word not in ("cluster=local_slurm", "dry_run=true")] + [
        *("cluster=local", "wait=true", "launch.snapshot=false"),
    ]


def problem(*words: str) -> str:
    with pytest.raises(HpcmmError) as refused:
        compose_stages(words)
    return str(refused.value)


def test_a_launch_without_stages_is_as_it_was():
    (stage,) = compose_stages(["train.seed=1,2"])
    assert (stage.name, len(stage.points)) == ("", 2)


def test_a_stage_has_the_overrides_of_the_launch_and_its_own(here):
    align, tune = compose_stages([*here, "train.seed=5"])
    configs = [stage.points[0].config for stage in (align, tune)]
    assert [config.name for config in configs] == ["run_align", "run_tune"]
    assert [config.train.steps for config in configs] == [4, 6]
    assert [config.train.seed for config in configs] == [5, 5]
    assert [config.model.decoder["name"] for config in configs] == ["fcn", "mlp"]
    assert [config.stages for config in configs] == [{}, {}]


def test_stages_come_from_a_file_of_their_group_too():
    decoder, words = compose_stages(
        ["cluster=local_slurm", "stages=decoder_then_words", "stages.decoder=[train.steps=9]"]
    )
    assert decoder.points[0].config.train.steps == 9
    assert words.points[0].config.train.learning_rate == 1e-4


def test_connectors_are_aligned_before_all_of_an_omni_modal_model_trains():
    align, tune = compose_stages(["task=omni", "model=omni_smollm2", "cluster=local_slurm", "stages=align_then_tune"])
    first, second = align.points[0].config.model, tune.points[0].config.model
    assert first.language_model.frozen and not second.language_model.frozen
    assert [part["frozen"] for part in first.modalities.values()] == [True, True]
    assert [part["frozen"] for part in second.modalities.values()] == [False, False]
    assert not any(part.get("connector_frozen") for part in first.modalities.values())


def test_what_is_typed_wins_and_that_is_said(here, capsys):
    stages = compose_stages([*here, "train.steps=2", "model.decoder=resnet"])
    assert [stage.points[0].config.train.steps for stage in stages] == [2, 2]
    assert stages[1].points[0].config.model.decoder["name"] == "resnet"
    said = capsys.readouterr().err
    assert "hpcmm: stage align: train.steps=4 is not used, for the launch gives that key." in said
    assert "hpcmm: stage tune: model/decoder=mlp is not used, for the launch gives that key." in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*TWO, "train.seed=1,2"], "train.seed=1 is one point of a sweep, and stages are single runs"),
        (["stages.a=[train.stepss=1]"], "At the stage a: train.stepss is not a configuration key"),
        (["stages.a=['train.seed=1,2']"], "At the stage a: train.seed=1 is a sweep"),
        ([*TWO, "cluster=local"], "stages have no queue to wait in with cluster=local: add wait=true"),
        ([*TWO, "task=script", "task.path=train.py"], "which a script keeps itself: queue scripts by after=RUN"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_a_sentence(words, expected):
    assert expected in problem(*words)


def test_each_stage_starts_from_the_one_before_which_is_not_there_yet(here):
    align, tune = (stage.planned for stage in plan_stages(here))
    assert align.points[0].config.train.init_from is None
    assert tune.points[0].config.train.init_from == str(align.run.root)
    assert tune.points[0].config.after == align.run.root.name
    assert not align.run.root.exists()


def test_where_the_whole_chain_begins_is_told_to_the_first_stage_alone(here, tmp_path):
    (tmp_path / "runs" / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "config.yaml").write_text("train: {seed: 0}\n")
    (tmp_path / "runs" / "old" / "checkpoints" / "latest").write_text("step_000001")
    (tmp_path / "runs" / "old" / "checkpoints" / "step_000001").mkdir()
    align, tune = (stage.planned for stage in plan_stages([*here, "train.init_from=old", "after=12"]))
    assert align.points[0].config.train.init_from == str(tmp_path / "runs" / "old")
    assert align.job.after == "12"
    assert tune.points[0].config.train.init_from == str(align.run.root)
    assert tune.job.after is None  # until the first one's job has a number


def test_a_stage_that_is_wrong_is_refused_before_any_is_queued(here):
    with pytest.raises(HpcmmError, match=r"At the stage tune: train.learning_rate is -1"):
        plan_stages([*here, "stages.tune=[train.learning_rate=-1.0]"])


def test_a_stage_whose_model_does_not_fit_the_one_before_is_refused_before_any_is_queued(here):
    words = [word for word in here if not word.startswith("stages.")]
    with pytest.raises(HpcmmError, match="vocab_size is 1024, but this run's is 512"):
        plan_stages([*words, "task=omni", "stages.a=[train.steps=2]", "stages.b=[data.vocabulary=512]"])


def test_a_dry_run_prints_the_script_of_each_stage(here):
    text = dry_run_of(plan_stages(here))
    assert text.count("#!/") == 2
    assert "# stage align: train.steps=4 " in text
    assert "#SBATCH --job-name=run_tune" in text


class _Job:
    def __init__(self, planned: Any, number: int) -> None:
        self.planned, self.run, self.job_id = planned, planned.run, str(number)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[_Job]:
    """What would have been queued."""
    jobs: list[_Job] = []

    def submit(planned: Any) -> _Job:
        assert planned.run.config.is_file()
        jobs.append(_Job(planned, 40 + len(jobs)))
        return jobs[-1]

    monkeypatch.setattr(submitting, "submit", submit)
    monkeypatch.setattr(launch_of_stages, "require_packages", lambda *_: None)
    return jobs


def test_on_slurm_all_are_queued_each_behind_the_one_before(here, submitted, monkeypatch):
    stages = plan_stages([*here, "launch.snapshot=false"])
    shown: list[str] = []
    assert launch_stages(stages, lambda name, job: shown.append(f"{name} {job.job_id}") or 0) == 0
    assert shown == ["align 40", "tune 41"]
    first, second = (job.run.submission_script.read_text() for job in submitted)
    assert "--dependency" not in first
    assert "#SBATCH --dependency=afterok:40\n#SBATCH --kill-on-invalid-dep=yes\n" in second


def test_if_slurm_refuses_a_stage_those_before_it_stay_and_are_named(here, submitted, monkeypatch):
    stages = plan_stages([*here, "launch.snapshot=false"])
    first, write = stages[0].planned.run.root, writing.write

    def refused(planned: Any) -> None:
        if planned.run.root != first:
            raise HpcmmError("The disk is full.")
        write(planned)

    monkeypatch.setattr(writing, "write", refused)
    with pytest.raises(HpcmmError, match=rf"queued and stay: align \(job 40\).*after={first.name} train.init_from="):
        launch_stages(stages, lambda *_: 0)


def test_without_a_queue_the_next_stage_starts_when_the_one_before_has_completed(local, submitted):
    stages = plan_stages(local)
    running: list[int] = []
    assert launch_stages(stages, lambda *_: running.append(len(submitted)) or 0) == 0
    assert running == [1, 2]


def test_without_a_queue_a_stage_that_fails_leaves_none_behind_it(local, submitted, capsys):
    stages = plan_stages(local)
    assert launch_stages(stages, lambda *_: 1) == 1
    assert [stage.planned.run.root.exists() for stage in stages] == [True, False]
    assert "stage align did not complete, so tune will not start." in capsys.readouterr().err
