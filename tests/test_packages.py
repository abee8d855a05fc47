"""What hpcmm imports is what pyproject.toml asks pip for."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OF_TRAINING = ("train", "evaluate", "serve", "workloads")
IN_THE_JOB = {"torch", "deepspeed", "transformers"}
"""Imported within functions by what runs in the job, in which the user's own Python has them or not."""
BY_MODULE = packages_distributions()


def name_of(requirement: str) -> str:
    """The distribution that a requirement is for, as pip compares names."""
    matched = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert matched
    return re.sub(r"[-_.]+", "-", matched.group()).lower()


def with_what_they_bring(requirements: list[str]) -> set[str]:
    """The distributions, and those that they require themselves without an extra."""
    asked = {name_of(each) for each in requirements}
    return asked | {name_of(need) for each in asked for need in requires(each) or () if "extra ==" not in need}


def imported(folder: str) -> set[str]:
    """The packages outside the standard library that a folder's modules, or a module, import anywhere."""
    place = TOP / "hpcmm" / folder
    found = set()
    for path in place.rglob("*.py") if place.is_dir() else [place]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"hpcmm"}


ROOMS = sorted(
    path.name for path in (TOP / "hpcmm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
)


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_imports_comes_with_what_is_installed_for_it(room: str) -> None:
    brought = with_what_they_bring(PROJECT["dependencies"])
    if room in OF_TRAINING:
        extras = PROJECT["optional-dependencies"]
        brought |= with_what_they_bring([*extras["train"], *extras["serve"]])
        brought |= {name_of(each) for each in extras["fp8"]}  # which scripts/setup.sh installs apart
    without = [
        module
        for module in imported(room) - IN_THE_JOB
        if not brought & {name_of(each) for each in BY_MODULE.get(module, [module])}
    ]
    assert without == []
