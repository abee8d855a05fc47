"""Where the command may write: never among its inputs, and only into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpcmm.analyze.__main__ import main

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
