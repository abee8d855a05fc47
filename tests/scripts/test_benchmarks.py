"""Every benchmark answers ``--help``, and can write its results as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.few(4)
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_json(script: str) -> None:
    done = run(script, "--help")

    assert done.returncode == 0, done.stderr
    assert "--json FILE  " in done.stdout


def test_results_are_written_whole_and_name_their_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measuring

    rows = [{"name": "ours", **measuring.summary([3.0, 1.0, 2.0], "s", "wall"), "times_as_fast": float("nan")}]
    measuring.write(tmp_path / "results.json", "example", rows)

    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["rows"] == [{"name": "ours", "wall_median_s": 2.0, "wall_min_s": 1.0, "times_as_fast": None}]
    assert written["benchmark"] == "example"
    assert written["units"] == {"_s": "seconds"}
    assert written["cores"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    done = run("launch.py", "--json", str(tmp_path / "missing" / "results.json"))

    assert done.returncode == 2
    assert "there is no folder" in done.stderr
