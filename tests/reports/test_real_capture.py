"""A real capture: cut off at any point, and with secrets in its environment."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcmm.analyze import analyze
from hpcmm.nsys.capture import start_under_nsys
from hpcmm.nsys.importer import import_qdstrm
from hpcmm.reports.convert import Converter
from hpcmm.reports.find import ReportSource

pytestmark = [
    pytest.mark.nsys,
    pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed"),
]
SECRET = "hunter2-the-secret"  # noqa: S105
PROGRAM = """
import os, subprocess, sys, time
if len(sys.argv) == 1:
    workers = [subprocess.Popen([sys.executable, __file__, "worker"], env=os.environ | {"RANK": r}) for r in "01"]
    for worker in workers:
        worker.wait()
else:
    from hpcmm import annotate
    for number in range(3):
        with annotate.step(number), annotate.phase("data"):
            time.sleep(0.01)
            if number == 2:
                subprocess.run(["sleep", "0.05"])
"""


@pytest.fixture(scope="module")
def captures(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """A launcher with two annotated workers, as nsys left it and as a report."""
    folder = tmp_path_factory.mktemp("capture")
    (folder / "program.py").write_text(PROGRAM)
    profile = ["nsys", "profile", "--trace=nvtx,osrt", "--sample=none", "--cpuctxsw=none", "-o", str(folder / "two")]
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "SLURM_JOB_ID": "7",
        "NCCL_DEBUG": "INFO",
        "WORLD_SIZE": "2",
        **{"MY_PASSWORD": SECRET, "SLURM_JWT": SECRET, "NCCL_TOKEN": SECRET, "SOME_URL": f"https://u:{SECRET}@x"},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert start_under_nsys(profile, [sys.executable, str(folder / "program.py")], folder / "began") == 0
    (left,) = folder.glob("two.*")
    found = {left.suffix: left}
    if left.suffix == ".qdstrm":
        shutil.copy(left, folder / "copy.qdstrm")
        import_qdstrm(folder / "copy.qdstrm", folder / "two.nsys-rep")
        found[".nsys-rep"] = folder / "two.nsys-rep"
    found[".sqlite"] = Converter.locate(folder / "cache").to_sqlite(ReportSource((left,)))
    yield found


def test_both_ranks_of_one_report_are_told_apart_and_no_secret_is_shown(captures, tmp_path: Path) -> None:
    analysis = analyze(captures[".nsys-rep"], tmp_path / "out")
    folder = analysis.write()
    tables = analysis.tables
    assert list(tables["coverage"]["rank"]) == [0, 1]
    launcher = tables["waitpid"].query("role == 'launcher'")
    assert set(launcher["verdict"]) == {"benign supervision"}
    assert set(launcher["child"]) - {""} <= {"rank 0", "rank 1"}
    within = tables["waitpid"].query("verdict == 'within step'")
    assert set(within["rank"]) == {0, 1}
    assert set(within["step"]) == {2}
    environment = tables["environment"].query("rank == 0").set_index("variable")["value"]
    assert environment["NCCL_DEBUG"] == "INFO"
    assert environment[["MY_PASSWORD", "SLURM_JWT", "NCCL_TOKEN", "SOME_URL"]].unique().tolist() == ["[redacted]"]
    assert b"NCCL_TOKEN" in captures[".nsys-rep"].read_bytes() or SECRET.encode() in captures[".sqlite"].read_bytes()
    assert SECRET.encode() in captures[".sqlite"].read_bytes()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert (
            SECRET.encode()
            not in subprocess.run(["gzip", "-dcf", str(path)], check=True, capture_output=True, timeout=60).stdout
        )


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("kind", "kept"),
    [(kind, kept) for kind in (".qdstrm", ".nsys-rep") for kept in (0.0001, 0.3, 0.99)]
    + [(".sqlite", kept / 16 + 0.01) for kept in range(16)],
)
def test_a_capture_cut_off_anywhere_is_told_beside_a_whole_one(
    captures, tmp_path: Path, kind: str, kept: float
) -> None:
    if kind not in captures:
        pytest.skip(f"this nsys leaves no {kind}")
    whole = captures[kind].read_bytes()
    (tmp_path / f"cut{kind}").write_bytes(whole[: int(len(whole) * kept)])
    shutil.copy(captures[".sqlite"], tmp_path / "whole.sqlite")
    analysis = analyze(tmp_path, tmp_path / "out")
    table = analysis.tables["coverage"].query(f"report == 'cut{kind}'")
    assert len(table) >= 1
    assert (analysis.tables["coverage"].query("report == 'whole.sqlite'")["status"].isin(["found", "duplicate"])).all()
    if kind == ".sqlite" or kept < 0.9:
        assert set(table["status"]) <= {"truncated", "duplicate"}
        assert table["reason"].str.len().gt(0).all()
        assert analysis.exit_status == 2
    assert not (tmp_path / "out" / "cache").exists()
