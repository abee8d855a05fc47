from pathlib import Path

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.reports.find import find_reports


def test_a_run_directory_gives_its_reports_in_order(tmp_path: Path) -> None:
    (tmp_path / "nsys").mkdir()
    for name in ("rank_0010.nsys-rep", "rank_0002.nsys-rep", "rank_0002.log"):
        (tmp_path / "nsys" / name).touch()
    found = find_reports([tmp_path])
    assert [source.name for source in found.sources] == ["rank_0002.nsys-rep", "rank_0010.nsys-rep"]
    assert found.run_dir is not None
    assert found.run_dir.root == tmp_path


def test_files_of_one_stem_are_one_capture_the_finished_report_first(tmp_path: Path) -> None:
    for suffix in (".qdstrm", ".sqlite", ".nsys-rep"):
        (tmp_path / f"r{suffix}").touch()
    (source,) = find_reports([tmp_path]).sources
    assert [path.suffix for path in source.candidates] == [".nsys-rep", ".sqlite", ".qdstrm"]


def test_a_file_given_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").touch()
    assert len(find_reports([tmp_path / "r.sqlite", tmp_path]).sources) == 1


def test_a_missing_path_and_a_file_of_another_kind_are_told(tmp_path: Path) -> None:
    with pytest.raises(HpcmmError, match="does not exist"):
        find_reports([tmp_path / "no"])
    (tmp_path / "x.txt").touch()
    with pytest.raises(HpcmmError, match="not an nsys report"):
        find_reports([tmp_path / "x.txt"])


def test_a_sweep_names_a_point_that_has_reports(tmp_path: Path) -> None:
    for point in ("0000", "0001"):
        (tmp_path / point / "nsys").mkdir(parents=True)
    (tmp_path / "ledger.json").touch()
    with pytest.raises(HpcmmError, match=r"is a sweep: give one of its points, such as .*/0000\.$"):
        find_reports([tmp_path])
    (tmp_path / "0001" / "nsys" / "rank_0000.nsys-rep").touch()
    with pytest.raises(HpcmmError, match=r"such as .*/0001\.$"):
        find_reports([tmp_path])


def test_what_cannot_be_a_report_but_has_its_name_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").symlink_to("a.sqlite")
    (tmp_path / "b.sqlite").symlink_to(tmp_path / "gone")
    (tmp_path / "c.sqlite").mkdir()
    assert [source.name for source in find_reports([tmp_path]).sources] == ["a.sqlite", "b.sqlite", "c.sqlite"]
