"""The documentation leads somewhere: its links, files and modules exist, and its lines fit a terminal."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
LONGEST_LINE = 120

MADE_BY_THE_READER = {"conf/cluster/mysite.yaml", "conf/model/decoder/wide.yaml"}
"""Files that the documentation tells the reader to write."""
NO_MODULES = {"hpcmm.comm", "hpcmm.patch"}
"""Names that begin like a module: a domain of NVTX, and a file of a run directory."""

_FENCE = re.compile(r"^\s*```.*?^\s*```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_PATH = re.compile(r"(?:hpcmm|conf|docs|tests|examples|benchmarks|slurm|profiles|scripts)(?:/[\w.*-]+)+/?")
_MODULE = re.compile(r"(?<![\w./-])hpcmm(?:\.\w+)+")
_SCRIPT = re.compile(r"\bpython (\w[\w/]*\.py)\b")
_READER_S_SCRIPTS = {"train.py"}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=page_name)


def prose_of(page: Path) -> str:
    """The page without its fenced blocks, whose lines are left empty."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))


def code_of(page: Path) -> Iterator[str]:
    """Each piece of code within a sentence or a table; it may go over a line's end."""
    for code in _CODE.findall(prose_of(page)):
        yield " ".join(code.split())


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """What GitHub calls the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@pages
def test_links_lead_to_what_is_there(page: Path):
    lost = []
    for link in _LINK.findall(prose_of(page)):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            lost.append(link)
    assert not lost


@pages
def test_files_that_are_named_exist(page: Path):
    named = {word for code in code_of(page) for word in code.split() if _PATH.fullmatch(word)}
    named |= set(_SCRIPT.findall(page.read_text(encoding="utf-8"))) - _READER_S_SCRIPTS
    lost = sorted(name for name in named - MADE_BY_THE_READER if not is_there(name, page))
    assert not lost


def is_there(name: str, page: Path) -> bool:
    """Whether the path, which may hold a ``*``, is in the repository, or beside the page."""
    return any(any(folder.glob(name.rstrip("/"))) for folder in (ROOT, page.parent))


@pages
def test_modules_that_are_named_exist(page: Path):
    named = set(_MODULE.findall(page.read_text(encoding="utf-8")))
    lost = sorted(name for name in named - NO_MODULES if not is_defined(name))
    assert not lost


def is_defined(dotted: str) -> bool:
    """Whether it is a module or a package, or a name at the top of one."""
    parts = dotted.split(".")
    if module_file(parts) is not None:
        return True
    holder = module_file(parts[:-1])
    return holder is not None and parts[-1] in top_names(holder)


def module_file(parts: list[str]) -> Path | None:
    path = ROOT.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def top_names(file: Path) -> frozenset[str]:
    """What the module defines or imports at its top, also for type checkers alone."""
    found: set[str] = set()
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node in [*body, *(inner for outer in body if isinstance(outer, ast.If) for inner in outer.body)]:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.ImportFrom(names=names) | ast.Import(names=names):
                found.update(each.asname or each.name for each in names)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return frozenset(found)


@pages
def test_no_line_of_text_is_long(page: Path):
    lines = enumerate(prose_of(page).split("\n"), 1)
    long = [number for number, line in lines if len(line) > LONGEST_LINE and not line.lstrip().startswith("|")]
    assert not long


def test_the_map_of_the_rooms_is_right():
    rows = re.findall(r"^\| (?:`hpcmm/(\w+)/`|beside the rooms) \|(.*)$", prose_of(ROOT / "docs/architecture.md"), re.M)
    rooms = {room: re.findall(r"`([\w/]+\.py)`", row) for room, row in rows}
    assert set(rooms) - {""} == {file.parent.name for file in (ROOT / "hpcmm").glob("*/__init__.py")}
    lost = [f"{room}/{name}" for room, names in rooms.items() for name in names if not is_in(room, name)]
    assert not lost


def is_in(room: str, name: str) -> bool:
    return (ROOT / "hpcmm" / room / name).is_file()
