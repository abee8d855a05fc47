"""Overrides become a typed configuration, or one sentence that names the valid keys."""

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump, load
from hpcmm.config.schema import Executor, Schedule
from hpcmm.errors import HpcmmError


def test_the_demo_composes_to_eight_ranks_under_nsys():
    run = compose_run(["experiment=anomaly_demo"])
    assert run.world_size == 8
    assert run.cluster.executor is Executor.slurm
    assert run.profile.tool == "nsys"
    assert run.global_batch_size == 8 * run.train.micro_batch_size


def test_the_command_line_overrules_the_experiment():
    run = compose_run(["experiment=anomaly_demo", "cluster=local", "train.steps=3", "train.schedule=constant"])
    assert run.cluster.executor is Executor.local
    assert run.train.steps == 3
    assert run.train.schedule is Schedule.constant


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepss=3", "did you mean train.steps?"),
        ("trian.steps=3", "did you mean train?"),
        ("cluster.nodez=3", "did you mean cluster.nodes?"),
        ("launch.nodes=2", "did you mean cluster.nodes?"),
        ("launch.runs_root=/tmp", "did you mean runs_root?"),
        ("+extra=1", "extra is not a configuration key"),
        ("train.steps=many", "train.steps: Value 'many' of type 'str' could not be converted to Integer."),
        ("cluster.executor=pbs", "expected one of [slurm, local]"),
        ("cluster=slrum", "local_slurm, modules_conda, slurm."),
        ("experiment=none_such", "choose one of anomaly_demo"),
        ("train.steps=[1", "Not a Hydra override"),
        ("steps", "Not a Hydra override"),
        ("train.py", "Put -- before the command that is to run: -- train.py ..."),
        ("~train.steps", "does not support deletion"),
        ("hydra.run.dir=x", "a setting of Hydra's"),
        ("hydra/launcher=submitit_slurm", "a setting of Hydra's"),
        ("train.steps=1,2", "is a sweep"),
        ("parallel.name=zero3", "the file is called that parallel=NAME chooses"),
        ("train=5", "train needs an option: choose one of anomaly"),
    ],
)
def test_a_wrong_override_is_one_sentence(override, expected):
    with pytest.raises(HpcmmError) as raised:
        compose_run([override])
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_dictionaries_take_any_key_and_keep_hostile_values_as_they_are():
    run = compose_run(["cluster.environment.GREETING='x; echo pwn'", "cluster.sbatch.reservation=maint"])
    assert run.cluster.environment == {"GREETING": "x; echo pwn"}
    assert run.cluster.sbatch == {"reservation": "maint"}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("[--lr,1e-4,007,true,--x=1]", ["--lr", "1e-4", "007", "true", "--x=1"]),
        ("['a, b',\"it's\",two words]", ["a, b", "it's", "two words"]),
        ("['$(id)','x; echo pwn']", ["$(id)", "x; echo pwn"]),
        ("['steps-${train.steps}']", ["steps-100"]),
        ("[]", []),
    ],
)
def test_a_script_s_words_stay_as_they_are_written(written, words):
    assert compose_run(["task=script", "task.path=a.py", f"task.args={written}"]).task.args == words


def test_numbers_stay_numbers_where_numbers_are_meant():
    run = compose_run(["task=function", "task.target=a:b", "task.kwargs={lr: 1e-4, name: x}", "task.kwargs.n=2"])
    assert run.task.kwargs == {"lr": 1e-4, "name": "x", "n": 2}


@pytest.mark.parametrize("word", ["2_1", "007", "1e3", "true", "123"])
def test_a_name_stays_as_it_is_typed(word):
    assert compose_run([f"name={word}"]).name == word


@pytest.mark.parametrize("word", ["1e-4", "007", "true", "null", ".5e3", "a: b", "it's", "# no", "-", "", "a\nb", "ü"])
def test_a_frozen_configuration_reads_back_as_it_was(tmp_path, word):
    run = compose_run(["experiment=anomaly_demo"])
    run.task.args = [word]
    run.task.kwargs = {"value": word, "number": 1e-4}
    run.cluster.environment = {"KEY": word}
    dump(run, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == run


@pytest.mark.parametrize("depth", [200, 500])
def test_what_is_nested_too_deeply_is_one_sentence(depth):
    with pytest.raises(HpcmmError):
        compose_run(["cluster=local", f"task.args={'[' * depth}{']' * depth}"])


def test_the_override_that_cannot_be_read_is_named():
    with pytest.raises(HpcmmError, match=r"Not a Hydra override: 'train.steps=abc=1'"):
        compose_run(["name=x", "train.steps=abc=1"])
