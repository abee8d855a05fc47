import errno
import io
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import another_user
import pytest

from hpcmm.errors import HpcmmError
from hpcmm.nsys.capture import start_under_nsys
from hpcmm.reports.convert import Converter, _copy
from hpcmm.reports.events import read_report
from hpcmm.reports.find import ReportSource


def test_a_given_export_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.sqlite").write_bytes(b"x")
    converter = Converter(tmp_path / "cache", None)
    assert converter.to_sqlite(ReportSource((tmp_path / "x.sqlite",))) == tmp_path / "x.sqlite"
    assert not (tmp_path / "cache").exists()


def test_without_nsys_an_export_of_the_same_capture_serves(tmp_path: Path) -> None:
    for name in ("x.nsys-rep", "x.sqlite"):
        (tmp_path / name).write_bytes(b"x")
    source = ReportSource((tmp_path / "x.nsys-rep", tmp_path / "x.sqlite"))
    assert Converter(tmp_path / "cache", None).to_sqlite(source) == tmp_path / "x.sqlite"


@pytest.mark.parametrize(("name", "tool"), [("x.nsys-rep", "nsys"), ("x.qdstrm", "QdstrmImporter")])
def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tool: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(HpcmmError, match=tool):
        Converter(tmp_path / "cache", None).to_sqlite(ReportSource((tmp_path / name,)))


@pytest.mark.parametrize(
    ("complaint", "told"),
    [
        (
            "Exportation error: Report was created in Nsight Systems version (2026.3.1),\n"
            "newer than your current version (2022.4.2).",
            "was recorded by nsys 2026.3.1, and nsys here is 2022.4.2: ",
        ),
        ("Exportation error: Version not supported: 2", "was recorded by a newer nsys than here: "),
    ],
)
def test_a_report_of_a_newer_nsys_is_to_be_exported_where_it_was_recorded_unless_it_has_been(
    tmp_path: Path, nsys: Path, complaint: str, told: str
) -> None:
    nsys.write_text(f"#!/bin/sh\ncat <<'END'\n{complaint}\nEND\nexit 1\n")
    report, export = tmp_path / "a report.nsys-rep", tmp_path / "a report.sqlite"
    report.write_bytes(b"x")
    converter = Converter(tmp_path / "cache", nsys)
    with pytest.raises(HpcmmError) as error:
        converter.to_sqlite(ReportSource((report,)))
    command = "nsys export --type sqlite -o 'a report.sqlite' 'a report.nsys-rep'"
    assert str(error.value).startswith(f"{report} {told}run {command} where it was recorded")
    assert "\n" not in str(error.value)
    export.write_bytes(b"")
    with pytest.raises(HpcmmError, match=r"(newer nsys|here is).*no bytes"):
        converter.to_sqlite(ReportSource((report, export)))
    export.write_bytes(b"x")
    assert converter.to_sqlite(ReportSource((report, export))) == export


@pytest.mark.nsys
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed")
def test_the_real_nsys_says_that_a_report_is_of_a_newer_one(tmp_path: Path) -> None:
    (tmp_path / "x.nsys-rep").write_bytes(b"NVIDIA Tegra Profiler Report 9.\n" + bytes(100))
    with pytest.raises(HpcmmError, match="newer nsys"):
        Converter.locate(tmp_path / "cache").to_sqlite(ReportSource((tmp_path / "x.nsys-rep",)))


def test_an_empty_file_is_a_cut_off_capture(tmp_path: Path) -> None:
    (tmp_path / "x.sqlite").touch()
    with pytest.raises(HpcmmError, match="no bytes"):
        Converter(tmp_path / "cache", None).to_sqlite(ReportSource((tmp_path / "x.sqlite",)))


@pytest.fixture
def nsys(tmp_path: Path) -> Path:
    """A stand-in of nsys whose export is a copy of the report."""
    made = tmp_path / "nsys"
    made.write_text('#!/bin/sh\ncat "$6" > "$5"\n')
    made.chmod(0o755)
    return made


def test_what_takes_a_report_s_place_once_it_was_looked_at_is_not_read(
    tmp_path: Path, nsys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "x.nsys-rep"
    report.write_text("the report")
    run = subprocess.run

    def after_exchange(*args: Any, **kwargs: Any) -> Any:
        report.unlink()
        os.mkfifo(report)
        return run(*args, **kwargs)

    monkeypatch.setattr("subprocess.run", after_exchange)
    export = Converter(tmp_path / "cache", nsys).to_sqlite(ReportSource((report,)))
    assert export.read_text() == "the report"


def test_an_export_that_another_user_could_exchange_is_copied_without_its_holes(tmp_path: Path) -> None:
    export = tmp_path / "x.sqlite"
    with export.open("wb") as file:
        file.write(b"begin")
        file.seek(1 << 36)
        file.write(b"end")
    another_user.give(export)
    converter = Converter(tmp_path / "cache", None)
    copy = converter.to_sqlite(ReportSource((export,)))
    assert copy.parent == converter.cache
    assert copy.stat().st_size == export.stat().st_size
    assert copy.stat().st_blocks * 512 < 1 << 24
    with copy.open("rb") as file:
        assert file.read(5) == b"begin"
        file.seek(1 << 36)
        assert file.read() == b"end"
    converter.discard(ReportSource((export,)))
    assert list(converter.cache.iterdir()) == []
    assert export.exists()


class Telling(io.BufferedReader):
    """A file whose file system answers an error if it is asked where data is."""

    number = 0

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        if whence in {os.SEEK_DATA, os.SEEK_HOLE}:
            raise OSError(self.number, os.strerror(self.number))
        return super().seek(to, whence)


def test_where_a_file_system_does_not_tell_of_holes_all_is_copied_and_a_failing_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "export").write_bytes(bytes(range(256)) * 40)
    with Telling(io.FileIO(tmp_path / "export")) as export:
        export.number = errno.EINVAL
        _copy(export, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "export").read_bytes()
        export.number = errno.EIO
        with pytest.raises(OSError, match="Input/output error"):
            _copy(export, tmp_path / "another copy")


def test_exports_go_into_no_folder_that_another_user_made_at_that_moment(
    tmp_path: Path, nsys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.nsys-rep").write_text("the report")

    def too_late(folder: Path) -> None:
        folder.mkdir(mode=0o777)
        another_user.give(folder)
        raise FileExistsError

    monkeypatch.setattr("hpcmm.reports.convert.make_private", too_late)
    with pytest.raises(HpcmmError, match="cache is another user's"):
        Converter(tmp_path / "cache", nsys).to_sqlite(ReportSource((tmp_path / "x.nsys-rep",)))
    assert list((tmp_path / "cache").iterdir()) == []


needs_nsys = pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed")


@pytest.mark.nsys
@needs_nsys
@pytest.mark.parametrize("name", ["x.nsys-rep", "x.qdstrm"])
def test_random_bytes_are_told_and_leave_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)) * 40)
    converter = Converter.locate(tmp_path / "cache")
    with pytest.raises(HpcmmError, match="could not be"):
        converter.to_sqlite(ReportSource((tmp_path / name,)))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.nsys
@needs_nsys
def test_a_real_capture_is_read_and_nothing_is_written_beside_it(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    profile = ["nsys", "profile", "--trace=osrt", "--sample=none", "--cpuctxsw=none", "-o", str(inputs / "r")]
    assert start_under_nsys(profile, ["sleep", "0.2"], tmp_path / "started") == 0
    before = {path.name: path.stat().st_mtime_ns for path in inputs.iterdir()}
    (capture,) = (path for path in inputs.iterdir() if path.suffix in {".qdstrm", ".nsys-rep"})
    converter = Converter.locate(tmp_path / "cache")
    export = converter.to_sqlite(ReportSource((capture,)))
    report = read_report(export, capture)
    assert report.events > 0
    assert "osrt" in report.traced
    assert {path.name: path.stat().st_mtime_ns for path in inputs.iterdir()} == before
    assert stat.S_IMODE(converter.cache.stat().st_mode) == 0o700
    assert converter.to_sqlite(ReportSource((capture,))) == export


def test_a_cache_given_by_a_relative_path_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Converter.locate(Path("runs/latest/analysis/cache")).cache == tmp_path / "runs/latest/analysis/cache"
