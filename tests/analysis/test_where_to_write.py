"""Where the command may write: never among its inputs, and only into a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import another_user
import pytest

from hpcmm.analyze.__main__ import main
from hpcmm.analyze.analysis import _cache
from hpcmm.errors import HpcmmError
from hpcmm.runs.ownership import exchangeable


@pytest.mark.parametrize(("mode", "is_own"), [(0o755, True), (0o1777, True), (0o2775, False), (0o777, False)])
def test_exports_go_where_nobody_else_can_exchange_them(mode: int, is_own: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        out = Path(made) / "out"
        out.mkdir()
        if os.geteuid() != 0:
            pytest.skip("a group of one's own has no other members")
        os.chown(out, 0, another_user.UID)
        out.chmod(mode)
        with _cache(out / "cache", keep=False) as cache:
            assert (cache == out / "cache") == is_own
            assert exchangeable(cache) is None
        assert [*out.iterdir()] == []
        if not is_own:
            kept = _cache(out / "cache", keep=True)
            with pytest.raises(HpcmmError, match="leave --keep-cache out"), kept:
                pass


SAMPLE = Path(__file__).parents[2] / "profiles" / "samples" / "clean"


def test_nothing_is_written_beside_the_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = tmp_path / "reports"
    shutil.copytree(SAMPLE, reports)
    before = sorted(reports.iterdir())

    assert main([str(reports), "--out", str(reports)]) == 1

    assert "holds the reports" in capsys.readouterr().err
    assert sorted(reports.iterdir()) == before


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("precious", encoding="utf-8")

    assert main([str(SAMPLE), "--out", str(tmp_path / "file")]) == 1

    assert "is not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


def test_an_empty_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(SAMPLE), "--out", ""])

    assert ended.value.code == 2
    assert "an empty name is no folder" in capsys.readouterr().err


def test_an_analysis_of_other_reports_is_not_replaced_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    samples = SAMPLE.parent
    for name, told in (("clean", False), ("clean", False), ("slow_data", True)):
        # Reports of the same names are others all the same.
        assert main([str(samples / name)]) == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[-1] == "Report: analysis/report.html"
        assert ("An earlier analysis of rank_0000.sqlite, " in said.err) == told
        assert ("was in analysis, and is replaced: --out DIR gives each a folder of its own." in said.err) == told
    assert main([str(samples / "clean"), "--tables", "osrt"]) == 0
    assert "and those of its tables that were written again are replaced" in capsys.readouterr().err
    assert main([str(samples / "clean"), "--out", "analysis"]) == 0
    assert "earlier" not in capsys.readouterr().err


def test_a_comparison_is_not_replaced_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for told in (False, True):
        assert main(["compare", str(SAMPLE), str(SAMPLE.parent / "slow_data")]) == 0
        assert ("An earlier comparison's table was there, and is replaced" in capsys.readouterr().err) == told
    assert [path.name for path in (tmp_path / "analysis").glob("*.csv")] == ["compare.csv"]
