"""The analysis as Python and the command line see it."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from hpcmm.analysis.study import TABLES
from hpcmm.analyze import Analysis, analyze, compare
from hpcmm.analyze.__main__ import main
from hpcmm.analyze.runs import read_reference, read_run
from hpcmm.errors import HpcmmError

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "profiles" / "samples"


@pytest.fixture(scope="module")
def clean() -> Analysis:
    return analyze(SAMPLES / "clean")


@pytest.fixture(scope="module")
def slow_data() -> Analysis:
    return analyze(SAMPLES / "slow_data")


@pytest.fixture(scope="module")
def written(clean: Analysis, tmp_path_factory) -> Path:
    return clean.write(tmp_path_factory.mktemp("written"))


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = analyze([SAMPLES / "slow_data" / f"rank_000{rank}.sqlite" for rank in (0, 2)])
    assert len(run.steps()) == 60
    assert list(tmp_path.iterdir()) == []
    assert run.out == Path("analysis")


def test_every_table_is_a_method_and_every_method_is_documented(clean: Analysis) -> None:
    for name, table in clean.tables.items():
        method = getattr(Analysis, name)
        assert method.__doc__, name
        pd.testing.assert_frame_equal(method(clean), table)


def test_a_table_is_made_once_and_the_callers_changes_stay_the_callers(clean: Analysis) -> None:
    assert clean.tables["phases"] is clean.tables["phases"]
    mine = clean.phases()
    mine["extra"] = 1
    mine.loc[0, "duration_s"] = -1.0
    assert "extra" not in clean.phases()
    assert clean.phases().loc[0, "duration_s"] > 0


@pytest.mark.parametrize(
    "run", ["slow_data", "slow_link", pytest.param("h100_2gpu_nccl.sqlite", marks=pytest.mark.long)]
)
def test_some_tables_are_those_of_the_whole_analysis(run: str) -> None:
    whole = analyze(SAMPLES / run)
    for chosen in (["osrt"], ["osrt", "environment", "startup"], ["phases", "osrt"]):
        some = analyze(SAMPLES / run, tables=chosen)
        assert set(some.tables) == set(chosen)
        for name in chosen:
            pd.testing.assert_frame_equal(some.tables[name], whole.tables[name])


def test_tables_that_were_not_asked_for_are_not_there_and_it_is_said(tmp_path: Path) -> None:
    some = analyze(SAMPLES / "slow_data", tables=["osrt"])
    with pytest.raises(HpcmmError, match="table phases was not asked for, only osrt"):
        some.phases()
    with pytest.raises(HpcmmError, match="only osrt was asked for"):
        some.wait_matrix()
    with pytest.raises(HpcmmError, match="there is no table ostr: choose among bottlenecks"):
        analyze(SAMPLES / "slow_data", tables=["ostr"])
    some.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["osrt.csv", "osrt.parquet"]


def test_all_tables_can_be_asked_for_by_name(clean: Analysis) -> None:
    assert set(TABLES) == set(clean.tables)


def test_the_command_writes_the_tables_that_it_is_told(tmp_path: Path, capsys) -> None:
    assert main([str(SAMPLES / "clean"), "--tables", "osrt,steps", "--out", str(tmp_path)]) == 0
    assert f"{tmp_path / 'osrt'}.csv: " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "osrt.csv",
        "osrt.parquet",
        "steps.csv",
        "steps.parquet",
    ]
    assert main([str(SAMPLES / "clean"), "--tables", "osrt,no", "--out", str(tmp_path)]) == 1
    assert "there is no table no" in capsys.readouterr().err


def test_the_wait_matrix_is_named_by_rank(clean: Analysis) -> None:
    matrix = clean.wait_matrix()
    assert matrix.shape == (4, 4)
    assert list(matrix.index) == list(matrix.columns) == [0, 1, 2, 3]
    waited = clean.comm_wait().groupby("rank")["wait_s_per_step"].sum()
    assert (matrix.sum(axis=1) <= waited + 1e-9).all()


def test_the_example_in_the_documentation_runs(written: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        code = block.replace('"runs/latest"', f'"{SAMPLES / "slow_data"}"')
        exec(code.replace('"runs/before"', f'"{written}"'))  # noqa: S102
    assert "data loading" in capsys.readouterr().out


def test_every_column_is_documented(clean: Analysis) -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    for name, table in clean.tables.items():
        title = next((title for title in sections if re.search(rf"\b{name}\b", title)), None)
        assert title is not None, f"docs/tables.md has no section on {name}"
        missing = [column for column in table.columns if f"`{column}`" not in sections[title]]
        assert not missing, f"{name}: {missing}"


def test_two_runs_may_be_reports_tables_or_analyses(clean: Analysis, slow_data: Analysis, written: Path) -> None:
    by_reports = compare(SAMPLES / "clean", slow_data).table
    pd.testing.assert_frame_equal(by_reports, compare(written, slow_data).table)
    pd.testing.assert_frame_equal(by_reports, compare(clean, slow_data).table)
    worse = by_reports[by_reports["kind"] == "bottleneck"].iloc[0]
    assert (worse["rank"], worse["phase"], worse["verdict"]) == (2, "data", "worse")


def test_a_table_reads_as_it_was_written(written: Path) -> None:
    found = read_run(written).tables
    for name, table in found.items():
        pd.testing.assert_frame_equal(table, pd.read_parquet(written / f"{name}.parquet"))


def many_alike(written: Path, folder: Path, **columns: pa.Array) -> Path:
    """A folder with a table of few bytes, which stands for one of very many, in the place of ``steps``."""
    for path in written.glob("*.parquet"):
        shutil.copy(path, folder)
    pa.parquet.write_table(pa.table(columns), folder / "steps.parquet", compression="zstd")
    assert (folder / "steps.parquet").stat().st_size < 1 << 20
    return folder


@pytest.mark.parametrize("rows", [1000, 30_000_000])
def test_a_small_table_that_stands_for_a_huge_one_is_not_read(written: Path, tmp_path: Path, rows: int) -> None:
    numbers = pa.array(np.zeros(rows, np.int8))
    text = pa.DictionaryArray.from_arrays(numbers, ["x" * (1 << 22 if rows == 1000 else 1)])
    many_alike(written, tmp_path, rank=numbers, step=numbers, duration_s=numbers, node=text)
    with pytest.raises(HpcmmError, match=r"steps.parquet cannot be read \(it is larger than an analysis writes\)"):
        read_run(tmp_path)


def test_a_table_whose_text_is_no_text_is_named(written: Path, tmp_path: Path) -> None:
    raw = pa.array([b"\x1b[31m\xff"])
    many_alike(written, tmp_path, node=pa.StringArray.from_buffers(1, raw.buffers()[1], raw.buffers()[2]))
    with pytest.raises(HpcmmError, match=r"steps.parquet cannot be read \(.*\): analyse the run again"):
        read_run(tmp_path)


def test_a_table_of_lists_is_not_read(written: Path, tmp_path: Path) -> None:
    many_alike(written, tmp_path, rank=pa.array([[1, 2]]))
    with pytest.raises(HpcmmError, match="it has columns of other types"):
        read_run(tmp_path)


@pytest.mark.parametrize("line", [b"", b"," * (1 << 17)])
def test_a_csv_file_of_any_size_ends_at_once(written: Path, tmp_path: Path, line: bytes) -> None:
    for path in written.glob("*.csv"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "efficiency.csv").open("wb") as file:
        file.write(line)
        file.truncate(len(line) or 1 << 40)
    with pytest.raises(HpcmmError, match=r"efficiency.csv cannot be read \(it is larger than an analysis writes\)"):
        read_run(tmp_path)


def test_no_link_and_no_pipe_is_read_as_a_table(written: Path, tmp_path: Path) -> None:
    for path in written.glob("*.csv"):
        shutil.copy(path, tmp_path)
    (tmp_path / "steps.csv").unlink()
    (tmp_path / "steps.csv").symlink_to(written / "steps.csv")
    with pytest.raises(HpcmmError, match="has no table steps"):
        read_run(tmp_path)
    (tmp_path / "steps.csv").unlink()
    os.mkfifo(tmp_path / "steps.csv")
    with pytest.raises(HpcmmError, match="has no table steps"):
        read_run(tmp_path)


def test_tables_are_read_from_csv_where_there_is_no_parquet(written: Path, tmp_path: Path) -> None:
    for path in written.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert set(compare(tmp_path, written).table["verdict"]) == {"no difference seen"}


def test_damaged_tables_are_named(written: Path, tmp_path: Path) -> None:
    for path in written.glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:100])
    with pytest.raises(HpcmmError, match=r"efficiency\.parquet cannot be read"):
        read_run(tmp_path)
    (tmp_path / "steps.parquet").unlink()
    (tmp_path / "efficiency.parquet").write_bytes((written / "efficiency.parquet").read_bytes())
    with pytest.raises(HpcmmError, match="has no table steps"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("efficiency", lambda frame: frame.drop(columns="scope")),
        ("efficiency", lambda frame: pd.concat([frame, frame])),
        ("steps", lambda frame: frame.assign(duration_s="x")),
        ("steps", lambda frame: frame.assign(duration_s=float("inf"))),
        ("bottlenecks", lambda frame: frame.assign(rank="one")),
    ],
)
def test_tables_that_no_analysis_wrote_are_named(written: Path, tmp_path: Path, table: str, change) -> None:
    for path in written.glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / f"{table}.parquet").unlink()
    change(pd.read_parquet(written / f"{table}.parquet")).to_csv(tmp_path / f"{table}.csv", index=False)
    with pytest.raises(HpcmmError, match=rf"{table}\.csv is not what an analysis writes"):
        compare(tmp_path, written)


def test_an_interrupt_is_one_sentence(clean: Analysis, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hpcmm.analyze.__main__.analyze", interrupted)
    assert main([str(SAMPLES / "clean"), "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_is_its_own_reference(clean: Analysis, written: Path) -> None:
    table = analyze(SAMPLES / "clean", reference=read_reference(written)).efficiency()
    run = table[table["scope"] == "run"].iloc[0]
    assert run["computation_scaling"] == pytest.approx(1.0)
    assert run["global_efficiency"] == pytest.approx(run["parallel_efficiency"])
    assert clean.efficiency()["computation_scaling"].isna().all()


def test_the_command_compares(written: Path, slow_data: Analysis, tmp_path: Path, capsys) -> None:
    slow = slow_data.write(tmp_path / "slow")
    assert main(["compare", str(written), str(slow)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert told.splitlines()[0].startswith("Steps are longer in B: ")
    assert re.search(r"delays by rank 2: data loading in data .* worse", told)
    assert {"compare.csv", "compare.parquet"} <= {path.name for path in slow.iterdir()}
    assert main(["compare", str(written), str(written), "--out", str(tmp_path / "same")]) == 0
    assert sorted(path.name for path in (tmp_path / "same").iterdir()) == ["compare.csv", "compare.parquet"]
    told = capsys.readouterr().out
    assert told.startswith("No difference seen in step time")
    assert "worse" not in told


def test_runs_without_steps_are_not_compared_and_the_remedy_is_named(clean: Analysis, tmp_path: Path) -> None:
    run = analyze(SAMPLES / "h100_2gpu_nccl.sqlite")
    with pytest.raises(HpcmmError) as refused:
        compare(run, clean)
    told = str(refused.value)
    assert "has no steps to compare: none of its NVTX ranges is clearly a step; --steps REGEX says which is one" in told
    assert "Analyse such runs with --steps REGEX --out DIR, a folder each, and name these folders here." in told
    assert told.endswith("The line to add: for batch in hpcmm.annotate.steps(loader):")
    with pytest.raises(HpcmmError, match=r"the reference run .* has no steps: none of .* --steps REGEX --out DIR"):
        read_reference(run.write(tmp_path / "written"))


def test_the_command_takes_a_reference(written: Path, tmp_path: Path, capsys) -> None:
    assert main([str(SAMPLES / "slow_data"), "--reference", str(written), "--out", str(tmp_path)]) == 0
    run = pd.read_parquet(tmp_path / "efficiency.parquet").iloc[0]
    assert run["computation_scaling"] > 0
    assert main([str(SAMPLES / "clean"), "--reference", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 1
    assert "nothing does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_the_help_tells_what_goes_in_and_out(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "exit status:" in told
    assert "RUN" in told
    assert all(len(line) <= 120 for line in told.splitlines())


def test_nothing_there_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 1
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("hpcmm.analyze: no nsys reports in ") for line in errors)
