"""Models side by side: which runs a path names, what may be concluded, and the tables as Markdown and LaTeX."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.evaluate.__main__ import _draw, _write, find_runs
from hpcmm.evaluate.evaluation import MEAN
from hpcmm.evaluate.side_by_side import COLOURS, Comparison
from hpcmm.page.outputs import escape
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.workloads.anomaly.data import mvtec, visa
from hpcmm.workloads.anomaly.data.standins import generate
from hpcmm.workloads.anomaly.data_root import data_config, data_root, ensure_data
from hpcmm.workloads.anomaly.evaluation import METRICS, POOLED, AnomalyEvaluation
from hpcmm.workloads.anomaly.origin import PUBLISHED, origins
from hpcmm.workloads.anomaly.schema import DataConfig, Layout, Standins

DECODERS = list(PUBLISHED)


def scores(spread: float = 0.02, trained_on: str = "stand-ins", scored_on: str = "stand-ins") -> pd.DataFrame:
    """Three seeds of each decoder; the second is the worst by far."""
    rows = [
        {"model": model, "seed": seed, "category": category, "trained_on": trained_on, "scored_on": scored_on}
        | dict.fromkeys(METRICS, (0.6 if place == 1 else 0.9) + spread * (seed - 1))
        for place, model in enumerate(DECODERS)
        for seed in range(3)
        for category in ("metal_nut", POOLED, MEAN)
    ]
    return pd.DataFrame(rows)


def compared(table: pd.DataFrame) -> Comparison:
    return Comparison.of(AnomalyEvaluation(), table)


class Drawing(AnomalyEvaluation):
    def draw(self, out, results):
        (out / "maps.png").write_text(f"{len(results)} pictures")


def test_no_output_is_written_through_a_link_that_another_user_left(tmp_path: Path) -> None:
    out, precious = tmp_path / "evaluation", tmp_path / "precious"
    out.mkdir()
    precious.write_text("mine")
    names = ["scores.csv", "summary.csv", "comparison.md", "comparison.tex", "comparison.png", "maps.png"]
    for name in names:
        (out / name).symlink_to(precious)
    _write(compared(scores()), out)
    _draw(Drawing(), [], out)
    assert precious.read_text() == "mine"
    assert sorted(path.name for path in out.iterdir() if not path.is_symlink()) == sorted(names)
    assert (out / "maps.png").read_text() == "0 pictures"
    assert Image.open(out / "comparison.png").format == "PNG"


def sweep(folder: Path, points: list[list[str]], trained: set[int]) -> SweepDir:
    found = SweepDir(folder)
    folder.mkdir()
    rows = [
        {"index": index, "overrides": overrides, "run": f"{index:04d}", "jobs": ["1"]}
        for index, overrides in enumerate(points)
    ]
    found.ledger.write_text(json.dumps({"points": rows}))
    for index in range(len(points)):
        found.point(index).create()
        if index in trained:
            (found.point(index).checkpoints / "latest").write_text("step_1")
    return found


@pytest.mark.parametrize("by", ["folder", "ledger", "link"])
def test_a_sweep_stands_for_its_trained_points(tmp_path: Path, by: str):
    found = sweep(tmp_path / "sweep", [["model/decoder=fcn", "train.seed=0"], ["train.learning_rate=1e-4"]], {1})
    (tmp_path / "latest").symlink_to("sweep")
    path = {"folder": found.root, "ledger": found.ledger, "link": tmp_path / "latest"}[by]
    candidates, unfinished = find_runs([path])
    assert [candidate.run for candidate in candidates] == [found.point(1)]
    assert candidates[0].settings == ("train.learning_rate=1e-4",)
    assert unfinished == [found.point(0)]


def test_a_run_may_be_named_as_it_is_in_the_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    found = sweep(tmp_path / "runs" / "sweep", [["train.seed=0"]], {0})
    found.shared.submission_script.touch()
    (tmp_path / "runs" / "latest").symlink_to("sweep")
    monkeypatch.chdir(tmp_path)
    assert [candidate.run for candidate in find_runs([Path("latest")])[0]] == [found.point(0)]


def test_decoder_and_seed_are_not_told_twice(tmp_path: Path):
    found = sweep(tmp_path / "sweep", [["model/decoder=mlp", "train.seed=3"]], {0})
    assert find_runs([found.root], AnomalyEvaluation.named_by)[0][0].settings == ()


def test_runs_and_sweeps_may_be_mixed(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    run.create()
    found = sweep(tmp_path / "sweep", [["train.seed=0"]], {0})
    assert [candidate.run for candidate in find_runs([run.root, found.root])[0]] == [run, found.point(0)]


def test_a_sweep_that_trained_nothing_is_named(tmp_path: Path):
    found = sweep(tmp_path / "sweep", [["train.seed=0"]], set())
    with pytest.raises(HpcmmError, match=r"No point of .*sweep has a finished checkpoint"):
        find_runs([found.root])
    found.ledger.write_text("{")
    with pytest.raises(HpcmmError, match="no ledger of a sweep"):
        find_runs([found.root])


def test_what_the_intervals_do_not_separate_is_not_ranked():
    said = " ".join(compared(scores()).remarks())
    worst = DECODERS[1]
    assert f"is better than {worst}" in said
    assert not any(f"is better than {model}" in said for model in DECODERS if model != worst)
    undecided = scores(spread=0.3)
    assert "separate no two models: none is ranked" in " ".join(compared(undecided).remarks())


def test_stand_ins_are_called_so_and_never_stand_beside_published_numbers():
    comparison = compared(scores())
    page = comparison.markdown()
    assert "These are stand-ins" in page
    assert "published accuracies" not in page
    assert comparison.published() is None
    for trained_on, scored_on in (("VisA", "stand-ins"), ("MVTec-AD", "MVTec-AD"), ("my_folder", "MVTec-AD")):
        assert compared(scores(trained_on=trained_on, scored_on=scored_on)).published() is None


def test_published_numbers_stand_beside_the_published_experiment():
    comparison = compared(scores(trained_on="VisA", scored_on="MVTec-AD"))
    found = comparison.published()
    assert found is not None
    beside = found[1]
    assert dict(beside[["model", "published accuracy"]].to_numpy()) == {
        "fcn": "0.9094",
        "mlp": "0.9109",
        "resnet": "0.9049",
        "mlp_bn": "0.9093",
    }
    assert "stand-ins" not in comparison.markdown()
    assert "## Beside the published accuracies" in comparison.markdown()


def test_the_tables_hold_every_model_and_category():
    table = scores()
    comparison = compared(table)
    cells = comparison.wide("image_auroc")
    assert list(cells.columns) == ["category", *DECODERS]
    assert list(cells["category"]) == ["metal_nut", POOLED, MEAN]
    own = table[(table["model"] == "mlp") & (table["category"] == MEAN)]["image_auroc"]
    assert cells.set_index("category").loc[MEAN, "mlp"].startswith(f"{own.mean():.3f} [")
    assert f"| metal\\_nut | {' | '.join(map(escape, cells.iloc[0, 1:]))} |" in comparison.markdown()


def test_names_cannot_break_out_of_latex_or_markdown():
    table = scores()
    table.loc[table["model"] == "fcn", "model"] = "fcn, a|b_{c} \\input{/etc/passwd} 50% [x](y) <b>\x1b[31m"
    table["category"] = table["category"].replace("metal_nut", "metal_nut\n& 100%")
    comparison = compared(table)
    text = "\n".join(line for line in comparison.latex().splitlines() if not line.startswith("%"))
    assert r"\input{" not in text
    assert r"metal\_nut \& 100\% & " in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(line.count(" & ") in {4, len(METRICS)} for line in body)
    page = comparison.markdown()
    assert [each for each in ("<b>", "\x1b", "[x](y)") if each in page] == []
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert {line.replace(r"\|", "").count("|") for line in lines} <= {6, len(METRICS) + 2}


def test_the_chart_has_a_mark_of_each_models_colour(tmp_path: Path):
    compared(scores()).draw_chart(tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as drawn:
        colours = {tuple(colour) for colour in np.asarray(drawn.convert("RGB")).reshape(-1, 3)}
    for colour in COLOURS[: len(DECODERS)]:
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_origins_are_told_by_stamp_and_categories(tmp_path: Path):
    config = DataConfig(train_images_per_category=1, test_images_per_category=2)
    generate(tmp_path / "made", config, seed=0)
    real = tmp_path / "real"
    for category in mvtec.CATEGORIES:
        (real / category / "train" / "good").mkdir(parents=True)
    (tmp_path / "visa" / "split_csv").mkdir(parents=True)
    rows = "".join(f"{category},train,normal,a.JPG,\n" for category in visa.CATEGORIES)
    (tmp_path / "visa" / visa.SPLIT).write_text("object,split,label,image,mask\n" + rows)
    trained = DataConfig(layout=Layout.visa, test_root=str(real), test_layout=Layout.mvtec)
    assert origins(tmp_path / "visa", trained) == ("VisA", "MVTec-AD")
    assert origins(tmp_path / "visa", replace(trained, test_categories=["screw"])) == ("VisA", "real")
    assert origins(tmp_path / "visa", replace(trained, test_root=str(tmp_path / "made"))) == ("VisA", "stand-ins")
    assert origins(real, DataConfig()) == ("MVTec-AD", "MVTec-AD")


def test_the_experiment_scores_on_stand_ins_of_other_photographs(tmp_path: Path):
    config = RunConfig(name="x")
    config.cluster.cache_dir = str(tmp_path)
    config.data = DataConfig(
        generate=True,
        layout=Layout.visa,
        standins=Standins.scenes,
        test_layout=Layout.mvtec,
        test_standins=Standins.surfaces,
        train_images_per_category=1,
        test_images_per_category=2,
    )
    ensure_data(config)
    root, data = data_root(config), data_config(config)
    assert data.test_root is not None
    made = [json.loads((folder / "standins.json").read_text()) for folder in (root, Path(data.test_root))]
    assert not set(made[0]["photographs"]) & set(made[1]["photographs"])
    assert not set(made[0]["photographs"].values()) & set(made[1]["photographs"].values())
    assert not set(made[0]["photographs"]) & {*mvtec.CATEGORIES, *visa.CATEGORIES}
    assert visa.train_samples(root, "cat")
    assert mvtec.test_samples(Path(data.test_root), "brick")
    assert origins(root, data) == ("stand-ins", "stand-ins")


def test_given_folders_take_the_place_of_the_stand_ins_and_are_never_written(tmp_path: Path):
    real = tmp_path / "mvtec"
    generate(real, DataConfig(train_images_per_category=1, test_images_per_category=2), seed=0)
    before = sorted(real.rglob("*"))
    config = RunConfig(name="x")
    config.cluster.cache_dir = str(tmp_path / "cache")
    config.data = DataConfig(
        generate=True, root=str(real), test_root=str(real), test_standins=Standins.surfaces, standins=Standins.scenes
    )
    ensure_data(config)
    assert (data_root(config), data_config(config).test_root) == (real, str(real))
    assert sorted(real.rglob("*")) == before
    assert not (tmp_path / "cache").exists()
