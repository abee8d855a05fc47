"""Arithmetic that must hold before a job queues."""

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError


def problems(*overrides):
    own = any(override in ("task=script", "task=function") for override in overrides)
    try:
        validate(compose_run([*([] if own else ["experiment=anomaly_demo"]), *overrides]))
    except HpcmmError as error:
        return str(error).splitlines()
    return []


def test_the_demo_is_valid():
    assert problems() == []


def test_a_right_global_batch_is_accepted():
    assert problems("train.global_batch_size=32") == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.global_batch_size=64"], "is 32: set train.micro_batch_size=8."),
        (["train.global_batch_size=33"], "choose a multiple of 8."),
        (["cluster.ranks_per_node=3"], "each rank drives one GPU"),
        (["cluster=local", "cluster.nodes=2"], "set cluster.nodes=1"),
        (["parallel.zero_stage=4"], "ZeRO has the stages 0, 1, 2 and 3"),
        (["data.slow_rank=8"], "the ranks are 0 to 7"),
        (["data=mvtec"], "data.root is not given"),
        (["model=clip"], "name it, or take a small random one of the same kind with model=clip_tiny"),
        (["model/llm=vicuna"], "model.llm.path is not given"),
        (["model.image_encoder=vgg"], "but hpcmm has clip, clip_tiny, efficientnet_lite0"),
        (["model.text_tower=bert"], "but hpcmm has clip, clip_tiny, imagebind"),
        (["profile.ranks=8"], "the ranks of this run are 0 to 7"),
        (["profile.ranks=first"], "write all, one_per_node"),
        (["profile.flags_file=none.yaml"], "profiles/nsys/ holds no such file"),
        (["profile.tool=perf"], "nsys is the only profiler"),
        (["cluster.template=none.j2"], "slurm/ holds no such file"),
        (["cluster.template=../pyproject.toml"], "slurm/ holds no such file"),
        (["train.learning_rate=nan"], "must be a finite number above 0"),
        (["train.betas=[0.9]"], "must be two numbers"),
        (["train.weight_decay=nan"], "train.weight_decay is nan"),
        (["train.focal_alpha=2"], "must lie between 0 and 1"),
        (["model.temperature=0"], "model.temperature is 0.0, but must be a finite number above 0"),
        (["model.decoder=poetry"], "hpcmm has fcn"),
        (["parallel.collective_timeout_s=-1"], "parallel.collective_timeout_s is -1, but must be at least 1"),
        (["cluster.kill_wait_s=0"], "cluster.kill_wait_s is 0"),
        (["task=script"], "give it as task.path=train.py"),
        (["task=function", "task.target=train.main"], "package.module:function"),
        (["task.path=train.py"], "the task is anomaly: add task=script"),
        (["task=script", "task.path=a.py", "task.kwargs.lr=1"], "the task is script: add task=function"),
        (["analyze=after", "profile=off"], "add profile=nsys"),
        (["analyze=after", "cluster=local"], "add wait=true"),
        (["after=12", "cluster=local"], "needs Slurm's queue"),
        (["cluster.container.engine=apptainer"], "set cluster.container.image"),
        (["cluster.container.image=a.sif"], "set cluster.container.engine"),
        (["cluster=h100_pyxis", "cluster.container.mounts=[data]"], "write /source or /source:/target"),
        (["launch.parallel_points=0"], "launch.parallel_points is 0"),
        (["name='../up'"], "it names a folder"),
        (["train.steps=0"], "train.steps is 0, but must be at least 1"),
        (["data.anomaly_probability=2"], "data.anomaly_probability is 2.0, but must lie between 0 and 1"),
        (["cluster.environment={1A: c}"], "not a name of an environment variable"),
        ([f"name={'a' * 300}"], "use at most 200"),
        (["train.steps=99999999999999999999"], "must be at most 2147483647"),
        (["data.shots=0"], "data.shots is 0, but must be at least 1"),
        (["cluster.modules=[a,[b]]"], "must be a plain list"),
        (["task=script", "task.path=a.py", "task.args=[1,[2]]"], "must be a plain list"),
        (["task=script", "task.path='\udcff.py'"], "bytes that are no UTF-8"),
        (["task=function", "task.target=a..b:c"], "package.module:function"),
        (["runs_root='~nobody-here/runs'"], "no such user's home"),
        (["cluster.cache_dir='~nobody-here/cache'"], "no such user's home"),
        (["cluster.sbatch.array=0-5"], "cluster.sbatch.array cannot be given: sweep a key"),
        (["cluster.sbatch.parsable="], "would not learn which job was submitted"),
        (["cluster.sbatch.nodes=9"], "cluster.nodes"),
        (["cluster.submit_environment.PATH=/x"], "it takes SLURM_CONF and SLURM_CLUSTERS alone"),
        (["cluster.environment.SLURM_JWT=x"], "set it in the shell that you launch from"),
        (["cluster.sbatch.export='ALL,SLURM_JWT=x'"], "SLURM_JWT would be written into the run's files"),
        (["cluster.setup=['export SLURM_JWT=x']"], "SLURM_JWT would be written into the run's files"),
    ],
)
def test_each_mistake_is_named(overrides, expected):
    said = problems(*overrides)
    assert len(said) == 1
    assert expected in said[0]


@pytest.mark.parametrize("root", ["runs", "~/runs"])
@pytest.mark.parametrize("name", ["50%j", "a\nb"])
def test_the_whole_path_of_a_run_is_looked_at(tmp_path, monkeypatch, root, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path / name))
    (said,) = problems(f"runs_root='{root}'")
    assert "whose whole path has no control characters and percent signs" in said
    assert repr(f"{tmp_path}/{name}/runs") in said


def setup_problems(*lines):
    config = compose_run(["cluster=slurm"])
    config.cluster.setup[:] = lines
    try:
        validate(config)
    except HpcmmError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["cat > /dev/null <<EOF"], "line 1 (`cat > /dev/null <<EOF`)"),
        (["true", "export DATA_DIR='/data/set"], "line 2 (`export DATA_DIR='/data/set`)"),
        (["true", "echo $(ls", "true"], "line 3 (`true`)"),
        (["echo `ls"], "line 1 (`echo `ls`)"),
        (["if true; then", "true"], "line 2 (`true`)"),
        (["true", "}"], "line 2 (`}`)"),
        (["true", "if ; then"], "line 2 (`if ; then`)"),
    ],
)
def test_setup_lines_that_leave_something_open_are_refused_and_the_line_is_named(lines, named):
    said = setup_problems(*lines)
    assert f"bash cannot read cluster.setup {named}: " in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "lines",
    [
        ["for i in 1 2; do", "echo $i", "done"],
        ["cat <<E", "it's `x`", "E"],
        ["shopt -s extglob", "ls !(a|b)"],
        ["true \\"],
        ["# it's a comment"],
        ["source /no/such/file", "exit 3"],
    ],
)
def test_setup_lines_that_stand_by_themselves_are_not_refused(monkeypatch, lines):
    monkeypatch.setenv("BASH_FUNC_module%%", "() {  if ; }")  # as some sites export one that bash cannot read
    assert setup_problems(*lines) == ""


def test_setup_lines_are_not_looked_at_without_a_bash(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_problems("echo 'only here") == ""


def test_all_mistakes_are_named_at_once():
    assert len(problems("train.steps=0", "parallel.zero_stage=7", "data.slow_rank=99")) == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launch.stage=data", "launch.stage is a list: write launch.stage=[data]."),
        ("task.args=--lr", "task.args is a list: write task.args=[--lr]."),
        ("launch.include=3", "launch.include is a list: write launch.include=[3]."),
    ],
)
def test_a_word_for_a_list_is_told_how_a_list_is_written(override, said):
    assert problems("task=script", "task.path=x.py", override) == [said]
