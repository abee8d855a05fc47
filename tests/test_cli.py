"""The one command ``hpcmm``, and what all commands make of errors, of Ctrl-C and of a reader that is gone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, entry_points
from importlib.util import find_spec
from pathlib import Path

import another_user
import pytest

from hpcmm.cli import COMMANDS, INTERRUPTED, main, run_command
from hpcmm.errors import HpcmmError
from hpcmm.resources import (
    PACKAGE,
    ask_for_module,
    find_modules_at_last,
    find_modules_in,
    guard_imports,
    searched_at_last,
)

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("pandas", "numpy", "torch", "hydra", "omegaconf", "submitit", "rich", "gradio")


def run(*words: object, **keywords) -> subprocess.CompletedProcess[str]:
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | keywords
    return subprocess.run([*map(str, words)], text=True, timeout=120, check=False, **keywords)


def python(code: str, **keywords) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, **keywords)


@pytest.fixture
def hpcmm(tmp_path_factory) -> Path:
    """The script that an installer makes of ``[project.scripts]``."""
    module, function = PROJECT["scripts"]["hpcmm"].split(":")
    path = tmp_path_factory.mktemp("bin") / "hpcmm"
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    path.chmod(0o755)
    return path


def test_its_help_lists_the_commands_with_a_line_each(hpcmm: Path) -> None:
    done = run(hpcmm, "--help", env=os.environ | {"COLUMNS": "200"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: hpcmm ")
    assert [*COMMANDS] == ["launch", "analyze", "jobs", "init", "doctor", "evaluate", "serve"]
    for name, line in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(line)}$", done.stdout, re.MULTILINE), name
    assert run(sys.executable, "-m", "hpcmm", "-h").stdout.startswith("usage: python -m hpcmm ")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["serve", "--help"]])
def test_what_is_not_needed_is_not_loaded(words: list[str]) -> None:
    code = f"import sys\nfrom hpcmm.cli import main\ntry: main({words})\n"
    done = python(code + f"finally: print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.endswith("[]\n"), done.stderr


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hpcmm {PROJECT['version']}\n"


@pytest.mark.parametrize(("words", "said"), [([], "COMMAND"), (["lanch"], "invalid choice: 'lanch'"), (["-x"], "-x")])
def test_a_word_that_is_no_command_is_an_error(hpcmm: Path, words: list[str], said: str) -> None:
    done = run(hpcmm, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "launch" in done.stderr or words == ["-x"]


@pytest.mark.parametrize("words", [*([name] for name in COMMANDS), ["analyze", "compare"], ["jobs", "status"]])
def test_its_usage_is_what_was_typed(hpcmm: Path, words: list[str], tmp_path: Path) -> None:
    shell = 'cd "$1" && rmdir "$1" && shift && exec "$@"'  # help is there without a working directory, too
    gone = tmp_path / "gone"
    gone.mkdir()
    by_script = run("sh", "-c", shell, "sh", gone, hpcmm, *words, "--help")
    assert (by_script.returncode, by_script.stderr) == (0, "")
    assert by_script.stdout.startswith(f"usage: hpcmm {' '.join(words)} ")
    by_module = run(sys.executable, "-m", f"hpcmm.{words[0]}", *words[1:], "--help", cwd=tmp_path)
    assert by_module.returncode == 0, by_module.stderr
    assert by_module.stdout.startswith(f"usage: python -m hpcmm.{' '.join(words)} ")


def test_it_does_what_the_module_does(hpcmm: Path, tmp_path: Path) -> None:
    mistake = [run(*start, "train.stepz=1", cwd=tmp_path) for start in ((hpcmm, "launch"), _module("launch"))]
    assert mistake[0].returncode == mistake[1].returncode == 1
    assert mistake[0].stderr == mistake[1].stderr
    missing = [run(*start, "nowhere", cwd=tmp_path) for start in ((hpcmm, "analyze"), _module("analyze"))]
    assert missing[0].returncode == missing[1].returncode == 1
    assert missing[0].stderr == missing[1].stderr
    assert missing[0].stderr.startswith("hpcmm.analyze: ")


def test_it_launches_the_same_code_as_the_module(hpcmm: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").touch()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    words = ("cluster=slurm", "task=script", "task.path=scripts/train.py", "dry_run=true")
    scripts = []
    for start in ((hpcmm, "launch"), (sys.executable, "-m", "hpcmm", "launch"), _module("launch")):
        done = run(*start, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        scripts.append(re.sub(r"\brun-\d{8}-\d{6}-[0-9a-f]{4}\b", "RUN", done.stdout))
    assert re.search(r"^export PYTHONPATH=\S+/RUN/code/hpcmm:\S+/RUN/code/project\$", scripts[0], re.MULTILINE)
    assert scripts[0] == scripts[1] == scripts[2]


PLANTED = "import os\nopen(os.environ['RAN'], 'a').write(__name__ + ' ')\n"
COMMANDS_HERE = [
    ["jobs", "status", "nothing"],
    ["analyze", "nothing"],
    ["doctor", "--no-nsys"],
    ["launch", "cluster=slurm", "dry_run=true", "launch.snapshot=false"],
]


def _plant(folder: Path) -> None:
    for name in ("yaml", "psutil", "omegaconf", "hydra", "rich", "attr", "typing_extensions", "pyarrow"):
        (folder / f"{name}.py").write_text(PLANTED)
    for name in ("argparse", "typing", "json", "dataclasses", "__future__"):
        (folder / f"{name}.py").write_text(PLANTED)


@pytest.mark.parametrize("words", COMMANDS_HERE, ids=lambda words: words[0])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_modules_in_a_folder_that_others_write_are_not_imported(hpcmm: Path, tmp_path, words, mode) -> None:
    _plant(tmp_path)
    tmp_path.chmod(mode)
    roots = [] if words[0] in {"jobs", "analyze"} else [f"runs_root={tmp_path.parent / 'runs'}"]
    for start in ((hpcmm, words[0]), _module(words[0]), (sys.executable, "-m", "hpcmm", words[0])):
        environment = os.environ | {"RAN": str(tmp_path / "ran")}
        done = run(*start, *words[1:], *roots, cwd=tmp_path, env=environment)
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "ran").exists(), (start, (tmp_path / "ran").read_text())


def test_modules_in_another_user_s_folder_are_not_imported(hpcmm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    _plant(folder)
    another_user.give(folder)
    for start in ((hpcmm, "jobs"), _module("jobs")):
        run(*start, "status", "nothing", cwd=folder, env=os.environ | {"RAN": str(tmp_path / "ran")})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o1777])
def test_one_s_own_modules_are_found_last_and_must_be_named_if_others_write_the_folder(tmp_path, monkeypatch, mode):
    tmp_path.chmod(mode)
    (tmp_path / "my_module_here.py").touch()
    (tmp_path / "sched.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = [*sys.path]
    find_modules_in(str(tmp_path), "launch")
    assert sys.path == ([*before, str(tmp_path)] if mode == 0o755 else before)
    assert (find_spec("my_module_here") is None) == (mode != 0o755)
    find_modules_at_last(("json",))
    assert (find_spec("my_module_here") is None) == (mode != 0o755)  # nobody has named it yet
    (tmp_path / "its_import.py").touch()
    assert (find_spec("its_import") is None) == (mode != 0o755)
    ask_for_module("my_module_here.sub")
    assert find_spec("my_module_here") is not None
    assert find_spec("its_import") is not None
    assert searched_at_last() == ([] if mode == 0o755 else [str(tmp_path)])
    assert sys.path == ([*before, str(tmp_path)] if mode == 0o755 else before)
    found = [find_spec(name) for name in ("my_module_here", "sched", "my_module_nowhere")]
    is_found = [each is not None and each.origin == str(tmp_path / f"{each.name}.py") for each in found]
    assert is_found == [True, False, False]


@pytest.mark.parametrize("name", ["yaml", "rich", "hydra", "logging", "secrets", "platformdirs", "psutil"])
def test_a_project_s_modules_hide_none_that_hpcmm_needs(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.py").write_text("print('hello')\n")
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the project was imported')\n")
    words = ("cluster=local", "dry_run=true", "--", "train.py")
    done = run(*_module("launch"), *words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)})
    assert (done.returncode, "the module of the project" in done.stderr) == (0, False), done.stderr


def test_entry_points_that_others_left_in_a_shared_folder_are_not_looked_at(tmp_path, monkeypatch):
    tmp_path.chmod(0o1777)
    metadata = tmp_path / "planted-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nplanted = pdb:set_trace\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    find_modules_in(str(tmp_path), "evaluate")
    find_modules_at_last(())
    guard_imports()
    assert searched_at_last() == [str(tmp_path)]
    assert "planted" not in [each.name for each in entry_points(group="torch.backends")]
    assert "pytest" in [each.metadata["Name"] for each in distributions()]


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"hpcmm.{name}")


@pytest.mark.parametrize(
    ("one_line", "told"), [(False, "hpcmm.x: a\nb\\x1b[31m\n"), (True, "hpcmm.x: a\\nb\\x1b[31m\n")]
)
def test_an_error_is_a_sentence_that_a_terminal_does_not_obey(capsys, one_line: bool, told: str) -> None:
    def refuse(_: list[str]) -> int:
        raise HpcmmError("a\nb\x1b[31m")

    assert run_command("hpcmm.x", refuse, [], one_line=one_line) == 1
    assert capsys.readouterr() == ("", told)


def test_the_disk_s_refusal_is_an_error_only_of_commands_that_say_so(capsys) -> None:
    def refuse(_: list[str]) -> int:
        raise OSError(28, "No space left on device")

    assert run_command("hpcmm.x", refuse, [], errors=(HpcmmError, OSError)) == 1
    assert capsys.readouterr().err == "hpcmm.x: [Errno 28] No space left on device\n"
    with pytest.raises(OSError, match="No space"):
        run_command("hpcmm.x", refuse, [])


@pytest.mark.parametrize(
    ("own", "general", "told"),
    [
        ((), None, ""),
        ((), "", "hpcmm.x: interrupted.\n"),
        ((), "the old one stays", "hpcmm.x: interrupted; the old one stays.\n"),
        (("job 7 stays",), "", "hpcmm.x: interrupted; job 7 stays.\n"),
        (("job 7 stays",), None, "hpcmm.x: interrupted; job 7 stays.\n"),
    ],
)
def test_ctrl_c_is_130_with_the_command_s_words(capsys, own, general, told: str) -> None:
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt(*own)

    assert run_command("hpcmm.x", interrupt, [], interrupted=general) == INTERRUPTED == 130
    assert capsys.readouterr() == ("", told)


def test_the_words_of_an_unexpected_error_steer_no_terminal() -> None:
    code = """\
from hpcmm.cli import run_command
def fails(_):
    raise RuntimeError("\\x1b[31mred\\nnext\\u202e")
run_command("x", fails, [])
"""
    done = python(code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("RuntimeError: \\x1b[31mred\nnext\\u202e\n")


@pytest.mark.parametrize("name", ["jobs", "doctor", "evaluate", "serve"])
def test_ctrl_c_in_a_command_leaves_no_traceback(name: str, tmp_path: Path) -> None:
    code = f"import hpcmm.{name}.__main__ as command, sys\ndef interrupt(*_): raise KeyboardInterrupt\n"
    done = python(code + "command._command = interrupt\nsys.exit(command.main(['list']))", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_exit_of_argparse_passes() -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("hpcmm.x", lambda _: sys.exit(2), [])
    assert ended.value.code == 2


PRINTS = {
    "lines": "for number in range(100_000): print(number)",
    "one line": "print('x')",
    "at once": "print('x', flush=True)",
    "rich": "from rich.console import Console; Console().print('x'); Console().print('y' * 100_000)",
    "argparse": "import argparse; argparse.ArgumentParser('x').parse_args(['--help'])",
}


@pytest.mark.parametrize("prints", PRINTS.values(), ids=PRINTS)
def test_a_reader_that_is_gone_has_enough(prints: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = f"from hpcmm.cli import run_command\nimport sys\ndef command(_):\n    {prints}\n    return 3\n"
    done = python(code + "sys.exit(run_command('x', command, []))", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_pipe_that_breaks_is_a_failure() -> None:
    code = "import os, sys\nfrom hpcmm.cli import run_command\ndef command(_):\n    reading, writing = os.pipe()\n"
    code += "    os.close(reading)\n    os.write(writing, b'x')\n"
    done = python(code + "sys.exit(run_command('x', command, []))")
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr
    done = python(code + "sys.exit(run_command('x', command, [], errors=(OSError,)))")
    assert (done.returncode, done.stderr) == (1, "x: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize("module", ["hpcmm.analyze", "hpcmm.jobs", "hpcmm.doctor", "hpcmm.evaluate", "hpcmm.serve"])
def test_no_command_minds_a_reader_that_has_enough_of_its_help(module: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(sys.executable, "-m", module, "--help", stdout=writing, cwd=tmp_path)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["evaluate", "/nowhere"], ["serve", "/nowhere"]])
def test_a_working_directory_that_is_gone_is_said_to_be_gone(hpcmm: Path, tmp_path: Path, words: list[str]) -> None:
    done = run("sh", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "sh", tmp_path, hpcmm, *words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"hpcmm.{words[0]}: The working directory is gone")
    assert "Traceback" not in done.stderr


def test_an_analysis_needs_no_working_directory(hpcmm: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    sample = Path(__file__).parents[1] / "profiles" / "samples" / "clean"
    words = ("analyze", sample, "--tables", "osrt", "--out", tmp_path / "out")
    done = run("sh", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "sh", gone, hpcmm, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "osrt.csv").is_file()
