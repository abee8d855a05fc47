"""What follows ``--`` runs as it was typed: a script, a module or an executable, at each point of a sweep."""

import sys
from pathlib import Path

import pytest

from hpcmm.config import command
from hpcmm.config.command import (
    note_on_outputs,
    note_on_rank,
    outputs_of,
    place_of_script,
    split,
    starts_workers,
    task_of,
    words_of,
)
from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump, load
from hpcmm.config.schema import TaskConfig
from hpcmm.config.sweep import compose_points
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError

AS_TYPED = [
    "--lr", "1e-4", '{"a": [1, "x"]}', "${oc.env:HOME}", "${", "a${b", "\\${x}", "???", "", "--", "-h", "--help", "a=b",
    "train.steps=3", "x,y", "[1,2]", "it's", '"q"', "ü→", "$HOME", "two\nlines", "null", "true", "007", "-m", "~", "#",
]  # fmt: skip


def test_every_word_reaches_the_frozen_configuration_as_it_was_typed(tmp_path):
    (point,) = compose_points(["cluster=local", "--", "train.py", *AS_TYPED])
    assert (point.config.task.path, point.config.task.args) == ("train.py", AS_TYPED)
    dump(point.config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml").task == point.config.task


def test_a_frozen_line_of_setup_that_looks_like_an_interpolation_stays_a_line(tmp_path):
    config = compose_run(["cluster=slurm"])
    config.cluster.setup = ["export A=${HOME}"]
    dump(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml").cluster.setup == config.cluster.setup


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (["train.py", "a"], TaskConfig(path="train.py", args=["a"])),
        (["-m", "pkg.mod", "-m", "a"], TaskConfig(module="pkg.mod", args=["-m", "a"])),
        (["-mpkg.mod"], TaskConfig(module="pkg.mod")),
        (["./run.sh", "a b"], TaskConfig(program="./run.sh", args=["a b"])),
        (["torchrun", "train.py", "-m"], TaskConfig(program="torchrun", args=["train.py", "-m"])),
    ],
)
def test_the_first_word_tells_what_runs(words, task):
    assert task_of(words) == task
    assert words_of(task, "python")[-len(words) :] == (words if words[0] != "-mpkg.mod" else ["pkg.mod"])
    assert split(["a=b", "--", *words, "--"]) == (["a=b"], [*words, "--"])
    assert split(["a=b"]) == (["a=b"], None)


def test_the_ranks_own_python_runs_a_script_as_if_the_script_were_named_alone(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    for python in (sys.executable, "python3"):
        for words, what in ((["train"], "path"), (["-m", "train"], "module"), (["-u", "train"], "program")):
            (point,) = compose_points(["cluster=slurm", "--", python, *words, "--lr"])
            assert getattr(point.config.task, what) == (python if what == "program" else "train")
            assert point.config.task.args[-1] == "--lr"
    (other,) = compose_points(["cluster=slurm", "cluster.python=/elsewhere/bin/python", "--", sys.executable, "train"])
    assert other.config.task.program == sys.executable


def test_what_task_args_sweeps_comes_behind_the_words_of_the_command():
    points = compose_points(["task.args=[--lr,1e-2],[--lr,1e-3]", "--", "train.py", "${x}"])
    assert [point.config.task.args for point in points] == [["${x}", "--lr", "1e-2"], ["${x}", "--lr", "1e-3"]]
    assert [point.overrides for point in points] == [("task.args=['--lr','1e-2']",), ("task.args=['--lr','1e-3']",)]
    points = compose_points(["parallel.threads_per_rank=1,2", "--", "-m", "pkg"])
    assert [(point.config.parallel.threads_per_rank, point.config.task.module) for point in points] == [
        (1, "pkg"), (2, "pkg"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--"], "Nothing follows --"),
        (["--", ""], "Nothing follows --"),
        (["--", "-m"], "-m needs the name of a module"),
        (["--", "-u", "train.py"], "-u is not a script, .*: write -- python -u train.py"),
        (["task=function", "--", "train.py"], "the task is function"),
        (["experiment=anomaly_demo", "--", "train.py"], "the task is anomaly"),
        (["task.path=a.py", "--", "train.py"], "task.path is given, and a command follows --: leave it out"),
        (["task.args=[a]", "--", "train.py"], "task.args is given, and a command follows --: leave it out"),
        (["task=script", "task.path=a,b", "--", "train.py"], "task.path is given"),
    ],
)
def test_what_names_no_command_or_two_is_refused_in_a_sentence(words, said):
    with pytest.raises(HpcmmError, match=said):
        compose_points(words)


@pytest.mark.parametrize("task", [["--", "train.py"], ["task=script", "task.path=train.py"]])
def test_a_key_that_only_hpcmm_s_own_training_reads_is_refused_for_a_script(task):
    for override in ("train.learning_rate=1e-3", "train.steps=100", "parallel.zero_stage=2", "train.seed=1,2"):
        with pytest.raises(HpcmmError, match=rf"{override.partition('=')[0]} would have no effect.* script's own arg"):
            compose_points([override, *task])
    assert compose_points(["profile=nsys", "profile.steps=1000:1010", *task])
    with pytest.raises(HpcmmError, match=r"data is a config group, .* A script has arguments of its own"):
        compose_points(["data.num_workers=2", *task])
    assert compose_points(["parallel.threads_per_rank=2", "parallel.rendezvous_timeout_s=9", *task])


def test_a_function_gets_what_it_takes_by_task_kwargs():
    with pytest.raises(HpcmmError, match=r"train\.seed would have no effect.*argument, in task\.kwargs"):
        compose_points(["task=function", "task.target=a:b", "train.seed=1"])


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        (["torchrun", "train.py"], "torchrun"),
        (["/env/bin/torchrun", "train.py"], "/env/bin/torchrun"),
        (["-m", "torch.distributed.run", "train.py"], "torch.distributed.run"),
        (["python", "-u", "-m", "torch.distributed.run", "train.py"], "torch.distributed.run"),
        (["accelerate", "launch", "train.py"], "accelerate"),
        (["train.py", "-m", "torch.distributed.run"], None),
        (["./torchrun.sh"], None),
    ],
)
def test_a_launcher_that_starts_workers_is_known_by_its_name(words, launcher):
    assert starts_workers(task_of(words)) == (launcher and Path(launcher).name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cluster.ranks_per_node=1", "--", "train.py"], "RANK and WORLD_SIZE are not set. For one rank a GPU: clus"),
        (["cluster.ranks_per_node=1", "--", "torchrun", "train.py"], None),
        (["cluster.ranks_per_node=1", "cluster.gpus_per_node=1", "--", "train.py"], None),
        (["cluster.ranks_per_node=4", "--", "train.py"], None),
    ],
)
def test_who_gets_no_rank_is_told_so(words, told):
    (point,) = compose_points(["cluster=slurm", "cluster.gpus_per_node=4", *words])
    said = note_on_rank(point.config)
    assert said is None if told is None else said is not None and told in said


def test_one_process_a_node_may_have_all_of_its_gpus_if_it_starts_workers_itself():
    def problems(*words):
        for point in compose_points(["cluster=slurm", "cluster.gpus_per_node=4", *words]):
            validate(point.config)

    for task in (["train.py"], ["-m", "pkg"], ["./run.sh"], ["torchrun", "train.py"]):
        problems("cluster.ranks_per_node=1", "--", *task)
    problems("cluster.ranks_per_node=1", "task=function", "task.target=a:b")
    with pytest.raises(HpcmmError, match=r"each rank drives one GPU, .* takes cluster\.ranks_per_node=1"):
        problems("cluster.ranks_per_node=2", "--", "train.py")
    with pytest.raises(HpcmmError, match="each rank of a workload drives one GPU"):
        problems("cluster.ranks_per_node=1")
    with pytest.raises(HpcmmError, match=r"torchrun starts the workers of a node itself, .* set cluster.ranks_per_nod"):
        problems("cluster.ranks_per_node=4", "--", "torchrun", "train.py")
    with pytest.raises(HpcmmError, match=r"deepspeed takes the node's number .* \$HPCMM_NODE_RANK"):
        problems("cluster.ranks_per_node=1", "cluster.nodes=2", "--", "deepspeed", "train.py")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["torchrun", "--nproc-per-node", "2", "train.py", "train.py"], 2),
        (["bash", "run"], 0),
        (["bash", "-x", "run", "train.py"], 1),
        (["python", "-u", "train.py"], 1),
        (["python", "-c", "print()", "train.py"], None),
        (["torchrun", "-m", "pkg", "train.py"], None),
        (["sh", "-c", "run", "train.py"], None),
        (["cat", "train.py"], None),
        (["train.py", "train.py"], None),
        (["torchrun", "none.py"], None),
    ],
)
def test_the_script_that_a_launcher_or_a_shell_runs_is_found_among_its_words(tmp_path, words, place):
    (tmp_path / "train.py").touch()
    (tmp_path / "run").touch()
    assert place_of_script(task_of(words), tmp_path) == place


def test_a_program_that_is_not_there_or_cannot_run_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "train").touch()
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")

    def required(program, *overrides):
        config = compose_run(["cluster=slurm", "cluster.python=/none/python", *overrides])
        config.task = TaskConfig(program=program)
        command.require_program(config, tmp_path)

    for program, said in (
        ("train", "not an executable on the PATH: write -- ./train"),
        ("trainn", "not an executable on the PATH"),
        ("./run.sh", "not executable: chmod .x it, or write -- bash ./run.sh"),
        ("./none.sh", "is not a file in"),
    ):
        with pytest.raises(HpcmmError, match=said):
            required(program)
    required("trainn", "cluster.modules=[tools]")
    required("./none.sh", "cluster.container.engine=apptainer", "cluster.container.image=a.sif")
    (tmp_path / "run.sh").chmod(0o755)
    required("./run.sh")


@pytest.mark.parametrize(
    ("words", "outputs"),
    [
        (["--out_dir=out", "--lr=1"], {"out_dir": "out"}),
        (["--output-dir", "a", "-o", "b"], {"output-dir": "a", "o": "b"}),
        (["training.output_dir=a", "hydra.run.dir=b"], {"training.output_dir": "a"}),
        (["--log_every", "3", "--resume", "x", "--save-every=2", "--optimizer=adam"], {}),
        (["--checkpoint_dir", "a", "--workdir=b"], {"checkpoint_dir": "a", "workdir": "b"}),
    ],
)
def test_arguments_that_say_where_a_script_writes_are_known_by_their_names(words, outputs):
    assert outputs_of(words) == outputs


def test_points_that_may_write_the_same_are_told_of_and_others_are_not(tmp_path):
    def note(*lines, reads_run_dir=False):
        return note_on_outputs([TaskConfig(path="train.py", args=line) for line in lines], reads_run_dir, tmp_path)

    assert "2 of the 3 points are told by out_dir to write to a" in note(
        ["--out_dir=a", "--lr=1"], ["--out_dir=a", "--lr=2"], ["--out_dir=b", "--lr=1"]
    )
    assert "all 2 points run the same command" in note(["--lr=1"], ["--lr=1"])
    assert f"all 2 points run in {tmp_path}" in note(["--lr=1"], ["--lr=2"])
    for lines in ([["--out_dir=a"], ["--out_dir=b"]], [["--lr=1"]], [["$HPCMM_RUN_DIR/1"], ["$HPCMM_RUN_DIR/2"]]):
        assert note(*lines) is None
    assert note(["--lr=1"], ["--lr=2"], reads_run_dir=True) is None
