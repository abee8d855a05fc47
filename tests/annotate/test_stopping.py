"""A script of the user's is asked to stop, all of its ranks agree, and it says that it stopped with a checkpoint."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpcmm
from hpcmm import annotate
from hpcmm.annotate import stopping


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCMM_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(stopping, "_requests", {})
    return tmp_path


def test_outside_of_hpcmm_nothing_asks_and_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("HPCMM_RUN_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stop").touch()
    assert not annotate.should_stop()
    annotate.stopped()
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]


def test_the_standard_library_is_enough(tmp_path):
    code = (
        "import sys; from hpcmm import annotate; print(annotate.should_stop()); annotate.stopped()\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'__main__'})"
    )
    source = str(Path(hpcmm.__file__).parents[1])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": source, "HPCMM_RUN_DIR": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert said == "False\nhpcmm\n"
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("module", sorted(path.stem for path in Path(annotate.__file__).parent.glob("*.py")))
def test_an_older_python_reads_it(module):
    source = Path(annotate.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    assert ast.parse(source, feature_version=(3, 9))
    assert "slots=True" not in source
    assert module == "__init__" or "from __future__ import annotations" in source


def test_a_script_is_asked_says_that_it_stopped_and_is_asked_for_good(run_dir, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert not annotate.should_stop()
    (run_dir / "stop").touch()
    now[0] += 1
    assert annotate.should_stop()
    (run_dir / "stop").unlink()
    now[0] += 1
    assert annotate.should_stop()
    annotate.stopped()
    assert (run_dir / "stopped").exists()


def test_a_thousand_steps_a_second_ask_the_file_system_once(run_dir, monkeypatch):
    now, looks = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Path, "exists", lambda self: looks.append(self) is not None)
    for _ in range(2000):
        assert not annotate.should_stop()
        now[0] += 0.001
    assert looks == [run_dir / "stop"] * 2


def test_rank_0_speaks_for_all_ranks(run_dir, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    annotate.stopped()
    assert not (run_dir / "stopped").exists()
    monkeypatch.setenv("RANK", "0")
    annotate.stopped()
    assert (run_dir / "stopped").exists()


def test_a_word_that_cannot_be_said_is_an_error(run_dir, monkeypatch):
    monkeypatch.setenv("HPCMM_RUN_DIR", str(run_dir / "gone"))
    with pytest.raises(FileNotFoundError):
        annotate.stopped()


RANK = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from hpcmm import annotate
from hpcmm.annotate import stopping
stopping._LOOK_S = 0.0
rank = int(sys.argv[1])
for group in ("default", "own"):
    run = Path(sys.argv[2]) / group
    run.mkdir(exist_ok=True)
    # A look of rank 1's own would find nothing.
    os.environ["HPCMM_RUN_DIR"] = str(run if rank == 0 else run / "elsewhere")
    answers = []
    for time in range(2):  # a script may make its groups anew
        store = dist.FileStore(str(run / f"store{time}"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        if group == "own":
            dist.get_backend = lambda: "nccl"
        answers.append(annotate.should_stop())
        if time == 1:
            if rank == 0:
                (run / "stop").touch()
            dist.barrier()
            answers += [annotate.should_stop() for _ in range(1 + rank)]  # agreed once, nobody waits for anybody
        dist.destroy_process_group()
    print(group, answers)
"""


def test_all_ranks_stop_after_the_same_step(tmp_path):
    command = [sys.executable, "-c", RANK]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    told = ["[False, False, True]", "[False, False, True, True]"]
    assert [said for said, _ in outputs] == [f"default {each}\nown {each}\n" for each in told], outputs
