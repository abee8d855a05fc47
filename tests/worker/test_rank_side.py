"""What runs in the job's Python: the standard library alone, of every Python from 3.9 on."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest
from other_pythons import VERSIONS, python_of

from hpcmm.config.compose import compose_run
from hpcmm.config.schema import config_of, toolkit_values
from hpcmm.errors import HpcmmError
from hpcmm.resources import PACKAGE
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.task import RankSettings, nsys_flags_of, read_settings, write_settings

PROJECT = PACKAGE.parent
WITH_PACKAGES = {
    "hpcmm.annotate.collectives": {"nvtx", "torch"},
    "hpcmm.annotate.hf": {"transformers"},
    "hpcmm.doctor.all_reduce": {"torch"},
}
"""Modules that the user's own script, or a check that can do without, imports with what they are for."""
IMPORTS = """\
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
problems = {}
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        problems[name] = error.name
print(json.dumps(problems))
"""


def rank_side():
    """The modules, by the one list of them."""
    listed = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    return {name: version for name, version in listed["per-file-target-version"].items() if version == "py39"}


def module_of(name):
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def run_by_itself(python, program, *words, flags=("-I",)):
    return subprocess.run([python, *flags, "-c", program, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_module_of_the_rank_s_side_is_imported_by_each_python_without_a_package(version):
    done = run_by_itself(python_of(version), IMPORTS, str(PROJECT), *map(module_of, rank_side()))
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout)
    assert {name for name, package in missing.items() if package not in WITH_PACKAGES.get(name, ())} == set()


GUARDED_IMPORTS = """\
import sys
sys.path.insert(0, sys.argv[1])
from hpcmm.resources import guard_imports
guard_imports()
import gettext, locale, sysconfig, xml.dom
print(sysconfig.get_path("stdlib"))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_each_python_imports_under_the_guard(version):
    done = run_by_itself(python_of(version), GUARDED_IMPORTS, str(PROJECT))
    assert done.returncode == 0, done.stderr


NOTES_IMPORTS = """\
import sys
sys.path.insert(0, sys.argv[1])
import hpcmm.worker.__main__, hpcmm.worker.entrypoint, hpcmm.worker.prepare, hpcmm.worker.nsys_rank, hpcmm.worker.stage
import hpcmm.worker.task, hpcmm.doctor.node, hpcmm.doctor.preflight, hpcmm.nsys.supervisor
from hpcmm.resources import PACKAGE
print(*(name for name, each in sys.modules.items() if (getattr(each, "__file__", None) or "").startswith(str(PACKAGE))))
"""


def test_what_a_rank_imports_is_on_the_list():
    done = run_by_itself(sys.executable, NOTES_IMPORTS, str(PROJECT))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {module_of(name) for name in rank_side()}
    assert all((PROJECT / name).is_file() for name in rank_side())


GIVEN = ["cluster=slurm", "profile=nsys", "task=script", "task.path=train.py", "task.args=['--x', '{\"a\": 1e-4}']"]


def test_a_rank_reads_its_settings_as_they_were_composed(tmp_path):
    config = compose_run([*GIVEN, "requeue=slurm", "cluster.container.engine=apptainer", "launch.stage=[/data]"])
    run = RunDir(tmp_path)
    write_settings(RankSettings(config, nsys_flags_of(config.profile), uses_deepspeed=False), run)
    read = read_settings(run)
    assert read == RankSettings(config, nsys_flags_of(config.profile), uses_deepspeed=False)
    assert read.nsys_flags["trace"]
    assert (read.config.requeue, read.config.cluster.container.engine) == ("slurm", "apptainer")


@pytest.mark.parametrize("version", VERSIONS)
def test_each_python_reads_the_same_settings(tmp_path, version):
    config = compose_run(GIVEN)
    write_settings(RankSettings(config), RunDir(tmp_path))
    program = (
        "import json, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "from hpcmm.runs.run_dir import RunDir\nfrom hpcmm.worker.task import read_settings\n"
        "from hpcmm.config.schema import Executor, toolkit_values\n"
        "config = read_settings(RunDir(Path(sys.argv[2]))).config\n"
        "assert config.cluster.executor is Executor.slurm, config\nassert f'{config.requeue}' == str(config.requeue)\n"
        "print(json.dumps(toolkit_values(config)))"
    )
    done = run_by_itself(python_of(version), program, str(PROJECT), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(toolkit_values(config)))


def test_a_key_that_is_missing_has_its_default_and_one_that_is_unknown_counts_for_nothing():
    assert config_of({"name": "x", "key_of_tomorrow": 1}).cluster.ranks_per_node == 1


@pytest.mark.parametrize("text", ["", "[]", '{"config": 1}', '{"config": {"task": {"args": 1}}}', '{"config": {}}'])
def test_settings_that_are_damaged_are_one_sentence(tmp_path, text):
    run = RunDir(tmp_path)
    run.rank_settings.write_text(text)
    with pytest.raises(HpcmmError, match=r"rank\.json is damaged: put back what hpcmm\.launch wrote"):
        read_settings(run)


def test_what_json_would_change_is_refused_before_anything_is_submitted(tmp_path):
    config = compose_run(["cluster=slurm", "task=function", "task.target=mine:main"])
    config.task.kwargs = {"layers": {1: "wide"}}
    with pytest.raises(HpcmmError, match=r"^task\.kwargs must hold numbers, texts"):
        write_settings(RankSettings(config), RunDir(tmp_path))


SHOWS_PATH = "import sys\nprint(sys.argv, [each for each in sys.path if each in ('', sys.argv[1], sys.argv[2])])\n"


@pytest.mark.parametrize("version", VERSIONS)
def test_no_python_looks_for_modules_in_the_current_folder_or_beside_the_starting_file(tmp_path, version):
    here = tmp_path / "here"
    for name in ("runpy", "text", "json", "site_of_mine"):
        here.mkdir(exist_ok=True)
        (here / f"{name}.py").write_text("raise SystemExit('planted')\n")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "shows.py").write_text(SHOWS_PATH)
    command = [python_of(version), str(PACKAGE / "start.py"), "shows", str(here), str(PACKAGE)]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here, env=environ)
    assert done.stdout == f"{[str(tmp_path / 'modules' / 'shows.py'), str(here), str(PACKAGE)]} []\n", done.stderr
