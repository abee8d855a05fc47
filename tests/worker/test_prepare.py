"""What the user named and no rank could read ends the job before its ranks start, in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config import config_file
from hpcmm.config.schema import ClusterConfig, TaskConfig
from hpcmm.errors import InputError
from hpcmm.jobs.diagnostics import JobDiagnostics
from hpcmm.jobs.first_failure import first_failure
from hpcmm.node.classify import Kind, kind_of_exception
from hpcmm.runs.failures import last_logged_error
from hpcmm.runs.run_dir import RunDir
from hpcmm.slurm.jobs import Job
from hpcmm.worker.prepare import prepare
from hpcmm.workloads.anomaly.data_root import ensure_data
from hpcmm.workloads.anomaly.schema import AnomalyConfig, DataConfig, LlmConfig, LlmKind, ModelConfig

ANOMALY = TaskConfig(name="anomaly", _target_="hpcmm.workloads.anomaly.workload.AnomalyWorkload")


def config(tmp_path: Path, data: DataConfig | None = None, model: ModelConfig | None = None) -> AnomalyConfig:
    cluster = ClusterConfig(name="here", cache_dir=str(tmp_path / "cache"))
    return AnomalyConfig(
        name="x", task=ANOMALY, cluster=cluster, data=data or DataConfig(), model=model or ModelConfig()
    )


@pytest.mark.parametrize(
    ("data", "model", "keys"),
    [
        (DataConfig(root="/none/such"), ModelConfig(), ["data.root is /none/such, but "]),
        (DataConfig(root="/", test_root="/none"), ModelConfig(), ["data.test_root is /none, but "]),
        (DataConfig(root="~nobody-of-this-name/x"), ModelConfig(), ["data.root is ~nobody-of-this-name/x, but "]),
        (
            DataConfig(root="/none/such"),
            ModelConfig(image_weights="/no/weights", text_encoder="/no/texts"),
            ["data.root is /none/such", "model.image_weights is /no/weights", "model.text_encoder is /no/texts"],
        ),
        (DataConfig(), ModelConfig(llm=LlmConfig(kind=LlmKind.folder, path="/no/llm")), ["model.llm.path is /no/llm"]),
    ],
)
def test_each_path_that_cannot_be_read_is_named_by_its_key(tmp_path, data, model, keys):
    with pytest.raises(InputError) as refused:
        prepare(config(tmp_path, data, model))
    said = str(refused.value)
    assert said.startswith("Input cannot be used: ")
    assert all(key in said for key in keys)
    assert said.count(", but ") == len(keys)
    assert "\n" not in said
    assert not (tmp_path / "cache").exists()  # nothing was built for a run that cannot start


def test_a_path_that_is_not_used_is_not_asked_for(tmp_path):
    model = ModelConfig(llm=LlmConfig(kind=LlmKind.none, path="/no/llm"))
    with pytest.raises(InputError, match=r"data\.root") as refused:
        prepare(config(tmp_path, DataConfig(root="/none"), model))
    assert "llm" not in str(refused.value)


def test_a_folder_in_another_layout_is_refused_with_the_reader_s_words(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"^Input cannot be used: No folder <category>/train/good lies under "):
        ensure_data(config(tmp_path, DataConfig(root=str(tmp_path / "images"))))


def test_the_job_s_log_tells_it_and_jobs_why_names_it(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    config_file.dump(config(tmp_path, DataConfig(root="/none/such")), run.config)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hpcmm.worker", "prepare", str(run.root)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("hpcmm: Input cannot be used: data.root is /none/such, but ")
    assert not run.attempts.exists()

    job = Job("7", "7", name="x", state="FAILED", exit_code="1:0", source="sacct")
    verdict = first_failure(JobDiagnostics(job, run, batch_error=last_logged_error(done.stderr)))
    assert verdict.kind is Kind.data
    assert verdict.rank is None
    assert verdict.what.startswith("before any rank started: Input cannot be used: data.root is /none/such, but ")


def test_a_rank_s_own_record_of_it_is_one_of_data_too():
    error = InputError("The data folder x does not exist.")
    assert kind_of_exception("hpcmm.errors.InputError", str(error)) is Kind.data
    assert kind_of_exception("ValueError", str(error)) is Kind.exception
