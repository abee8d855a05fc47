"""Sweep overrides become points; a sweep's ledger knows which of them failed."""

import json

import pytest

from hpcmm.config.sweep import compose_points
from hpcmm.errors import HpcmmError
from hpcmm.launch import submit
from hpcmm.launch.plan import plan
from hpcmm.launch.submit import resubmit
from hpcmm.runs.ledger import Ledger, LedgerPoint, RefusedEntry, read_ledger, refused_of
from hpcmm.runs.run_dir import SweepDir


def test_the_points_are_the_product_of_what_is_swept():
    points = compose_points(["experiment=anomaly_demo", "train.learning_rate=1e-2,1e-3", "train.seed=range(3,5)"])
    assert [(p.config.train.learning_rate, p.config.train.seed) for p in points] == [
        (1e-2, 3), (1e-2, 4), (1e-3, 3), (1e-3, 4),
    ]  # fmt: skip
    assert points[1].overrides == ("train.learning_rate=0.01", "train.seed=4")
    assert all(p.config.name == "anomaly_demo" for p in points)


def test_without_a_sweep_there_is_one_point_with_no_overrides_of_its_own():
    (point,) = compose_points(["train.steps=3"])
    assert point.overrides == ()
    assert point.config.train.steps == 3


def test_groups_lists_and_dictionaries_can_be_swept():
    points = compose_points(["profile=off,nsys", "task=script", "task.path=a.py", "task.args=[--lr,1e-3],[--lr,1e-4]"])
    assert [(p.config.profile.tool, p.config.task.args[1]) for p in points] == [
        (None, "1e-3"), (None, "1e-4"), ("nsys", "1e-3"), ("nsys", "1e-4"),
    ]  # fmt: skip
    points = compose_points(["task=function", "task.target=a:b", "task.kwargs.lr=1,2", "task.kwargs.n=3,4"])
    assert [p.config.task.kwargs for p in points][1:3] == [{"lr": 1, "n": 4}, {"lr": 2, "n": 3}]


def test_a_value_that_others_refer_to_reaches_them():
    points = compose_points(["train.steps=5,6", "train.warmup_steps=${train.steps}"])
    assert [p.config.train.warmup_steps for p in points] == [5, 6]


def test_points_share_no_list():
    first, second = compose_points(["train.seed=1,2"])
    first.config.train.betas.append(0.5)
    assert len(second.config.train.betas) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster=a30,slurm"], "cluster differs between the points cluster=a30 and cluster=slurm"),
        (["runs_root=a,b"], "runs_root differs"),
        (["train.steps=interval(1,3)"], "has no end"),
        (["train.steps=1,many"], "train.steps: Value 'many'"),
        (["train.stepz=1,2"], "did you mean train.steps?"),
        (["train.seed=range(0,1000)", "train.steps=range(1,1000)"], "has 999000 points"),
        (["train.steps=0", "train.seed=4,5"], "At the point train.seed=4: train.steps is 0"),
        (["train.steps=1,2", "cluster=local"], "cluster=local has no Slurm"),
        (["parallel=glob(zero9*)"], "parallel=glob(zero9*) fits no option of the group parallel, which has 3d, ddp, "),
        (["optimizer=glob(*, exclude=*)"], "fits no option of the group optimizer, which has adamw, "),
        (["train.steps=glob(*)"], "glob() is for config groups, and train.steps is a key: list its values."),
    ],
)
def test_what_cannot_be_one_array_is_refused(overrides, expected):
    with pytest.raises(HpcmmError) as raised:
        plan(compose_points(overrides), overrides)
    assert expected in str(raised.value)


def test_points_that_cannot_run_are_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["task=omni", "cluster=slurm", "cluster.nodes=2", "dry_run=true", "parallel=ddp,expert,zero1"]
    planned = plan(compose_points(overrides), overrides)
    assert [point.overrides for point in planned.points] == [("parallel=ddp",), ("parallel=zero1",)]
    assert [point.run.root.name for point in planned.points] == ["0000", "0001"]
    (refused,) = planned.refused
    assert refused.overrides == ("parallel=expert",)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "hpcmm: 1 of 3 points is refused; the others go on:"
    assert said[1].startswith("  parallel=expert: parallel.mesh.expert is 2, but ")
    assert said[1].endswith("the language model has no experts: leave it out.")


def test_a_launch_of_one_run_is_refused_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["task=omni", "cluster=slurm", "cluster.nodes=2", "dry_run=true", "parallel=expert"]
    with pytest.raises(HpcmmError, match=r"^parallel\.mesh\.expert is 2"):
        plan(compose_points(overrides), overrides)


def test_a_ledger_keeps_the_points_that_were_refused(tmp_path):
    ledger = Ledger(SweepDir(tmp_path), [LedgerPoint(0, ["a=1"], "0000")], [RefusedEntry(["a=2"], "a is too large.")])
    ledger.write()
    read_ledger(tmp_path).note_array("7", read_ledger(tmp_path).points)
    assert read_ledger(tmp_path).refused == [RefusedEntry(["a=2"], "a is too large.")]
    assert refused_of(SweepDir(tmp_path)) == [("a=2", "a is too large.")]


def ledger_of(folder, jobs):
    points = [LedgerPoint(index, [f"train.seed={index}"], f"{index:04d}", list(ids)) for index, ids in enumerate(jobs)]
    ledger = Ledger(SweepDir(folder), points)
    for point in points:
        ledger.run(point).root.mkdir()
    ledger.write()
    return read_ledger(folder)


def test_the_state_of_a_point_is_that_of_its_latest_job(tmp_path, monkeypatch):
    ledger = ledger_of(tmp_path, [["7"], ["7"], ["7", "9"], ["7", "9"], ["7"], [], ["7"], ["7"]])
    asked = []
    monkeypatch.setattr(
        submit, "array_states", lambda jobs: asked.append(sorted(jobs)) or {"7_4": "RUNNING", "7_0": "COMPLETED"}
    )
    requeued = {6: "7_6 stopped\n7_6 0\n", 7: "7_7 0\n7_7 143\n"}
    for index, text in ({0: "7_0 0\n", 1: "7_1 1\n", 2: "7_2 1\n9_2 0\n", 3: "7_3 0\n"} | requeued).items():
        (tmp_path / f"{index:04d}" / "exit_status").write_text(text)
    done, failed, active = "COMPLETED", "FAILED", "ACTIVE"
    assert [*submit.point_states(ledger).values()] == [done, failed, done, failed, active, failed, done, failed]
    assert asked == [["7", "9"]]


def test_only_one_launcher_at_a_time_submits_points(tmp_path):
    ledger = ledger_of(tmp_path, [["7"]])
    with ledger.locked():
        with pytest.raises(HpcmmError, match="being submitted by another launch"), read_ledger(tmp_path).locked():
            pass
        with pytest.raises(HpcmmError, match="being submitted by another launch"):
            resubmit(tmp_path)
    with ledger.locked():
        pass


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": []}', '{"points": [{"index": 0}]}', '{"points": [{}]}'])
def test_what_is_no_ledger_is_said_to_be_none(tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(HpcmmError, match="is no ledger of a sweep"):
        read_ledger(tmp_path)


def test_a_new_array_is_noted_on_disk(tmp_path):
    ledger = ledger_of(tmp_path, [["7"], ["7"]])
    ledger.note_array("8", ledger.points[1:])
    assert [point["jobs"] for point in json.loads((tmp_path / "ledger.json").read_text())["points"]] == [
        ["7"],
        ["7", "8"],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"run": "../elsewhere"},
        {"run": 5},
        {"index": 1},
        {"index": True},
        {"overrides": [1]},
        {"jobs": ["--state=all"]},
        {"jobs": 7},
    ],
)
def test_a_damaged_ledger_is_refused(tmp_path, change):
    ledger_of(tmp_path, [["7"]])
    file = tmp_path / "ledger.json"
    (point,) = json.loads(file.read_text())["points"]
    file.write_text(json.dumps({"points": [point | change]}))
    with pytest.raises(HpcmmError, match="its points are damaged"):
        read_ledger(tmp_path)


def test_another_user_s_ledger_is_refused_for_its_scripts_would_run(tmp_path, monkeypatch):
    ledger_of(tmp_path, [["7"]])
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(HpcmmError, match="another user's"):
        read_ledger(tmp_path)


@pytest.mark.parametrize(
    ("swept", "expected"),
    [
        ("range(0,inf)", "has no end"),
        ("range(0,10,0)", "has no end"),
        ("range(0,1e18)", "more than 100000 points"),
        ("range(1e17,1e18,1)", "has no end"),
        ("range(0,1000000)", "more than 100000 points"),
    ],
)
def test_a_range_without_measure_is_refused_before_it_is_made(swept, expected):
    with pytest.raises(HpcmmError, match=expected):
        compose_points([f"train.learning_rate={swept}"])


def test_a_single_run_is_said_to_be_no_sweep(tmp_path):
    (tmp_path / "submission.sh").touch()
    with pytest.raises(HpcmmError, match="is a single run, and no sweep: launch it again"):
        resubmit(tmp_path)
