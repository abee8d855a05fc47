"""What a user's own files and classes get wrong: one sentence each, with the file and the line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError

WORKLOAD = """\
from dataclasses import dataclass
from hpcmm.config.keys import key
from hpcmm.config.schema import RunConfig
from hpcmm.config.workload import Workload

@dataclass
class Config(RunConfig):
    width: int = key(3, "A width.", least=1)

class Mine(Workload):
    schema = Config

    def training_class(self):
        raise NotImplementedError
"""
TASK = "# @package _global_\ntask:\n  name: mine\n  _target_: {package}.workload.Mine\n"
PART = "_target_: hpcmm.workloads.anomaly.models.decoders.fcn.FcnDecoder\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder of a user's with a workload in a package that no other test has imported."""
    package = f"mine_{abs(hash(request.node.name)):x}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / "workload.py").write_text(WORKLOAD)
    for group in ("task", "cluster", "model/decoder", "experiment"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    (tmp_path / "conf" / "task" / "mine.yaml").write_text(TASK.format(package=package))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / package


def said(*overrides: str) -> str:
    with pytest.raises(HpcmmError) as raised:
        validate(compose_run(["launch.config_dir=conf", "cluster=local", *overrides]))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_right_one_is_accepted(own: Path):
    config = compose_run(["launch.config_dir=conf", "cluster=local", "task=mine", "width=4"])
    validate(config)
    assert config.width == 4


@pytest.mark.parametrize(
    ("file", "text", "overrides", "expected"),
    [
        ("model/decoder/wide.yaml", PART + "kernel: [5\n", ["model/decoder=wide"], "wide.yaml cannot be read: line"),
        ("model/decoder/wide.yaml", PART + "kernel: [5\n", ["model.decoder=wide"], "wide.yaml cannot be read: line"),
        ("model/decoder/wide.yaml", PART + "kernel 5\n", ["model/decoder=wide"], "could not find expected ':'"),
        ("cluster/bad.yaml", "nodes: [4\n", ["cluster=bad"], "bad.yaml cannot be read: line"),
        ("task/twice.yaml", "name: a\nname: b\n", ["task=twice"], "found duplicate key name"),
        ("task/open.yaml", "train: {\n", ["task=open"], "open.yaml cannot be read: line 2"),
        ("task/tab.yaml", "train:\n\tsteps: 3\n", ["task=tab"], "tab.yaml cannot be read: line 2"),
        ("task/plain.yaml", "hello\n", ["task=plain"], "task.hello is not a configuration key"),
        ("cluster/typed.yaml", "name: typed\nnodes: four\n", ["cluster=typed"], "Value 'four' of type 'str'"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(own: Path, file: str, text: str, overrides: list[str], expected: str):
    (own.parent / "conf" / file).write_text(text)
    assert expected in said(*overrides)


def test_a_file_that_is_not_utf_8_is_named(own: Path):
    (own.parent / "conf" / "cluster" / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "latin.yaml cannot be read: it is not UTF-8" in said("cluster=latin")


def many_aliases(merge: bool) -> str:
    """A small file that stands for 10^12 values."""
    word = "<<: [{}]" if merge else "b: [{}]"
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i}\n  {word.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 13)]
    return "\n".join(lines) + "\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (many_aliases(False), "its aliases stand for more than 100000 values"),
        (many_aliases(True), "its aliases stand for more than 100000 values"),
        ("a: &a [*a]\n", "its alias *a stands for what it lies in"),
        ("a: " + "[" * 10_000 + "*a", "it has more values within values than expected"),
        ("a: 2\ntime_limit_min: " + "1:" * 400_000 + "1\n", "line 2: time_limit_min is a number of 800001 characters"),
        ("nodes: -" + "1" * 1_000_000, "line 1: nodes is a number of 1000001 characters: write 100 at most"),
        ("nodes: 0x" + "a" * 100_000, "line 1: nodes is a number of 100002 characters"),
        ('nodes: !!int "' + "1:" * 10_000 + '1"', "line 1: nodes is a number of 20001 characters"),
        ("a:\n  - " + "1_" * 10_000, "line 2: there is a number of 20000 characters"),
    ],
)
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("cluster/bad.yaml", "cluster=bad"),
        ("model/decoder/bad.yaml", "model/decoder=bad"),
        ("model/decoder/bad.yaml", "model.decoder=bad"),
        ("experiment/bad.yaml", "experiment=bad"),
    ],
)
def test_a_small_file_that_stands_for_one_without_end_is_refused(
    own: Path, text: str, expected: str, file: str, chosen: str
):
    (own.parent / "conf" / file).write_text(text)
    assert f"bad.yaml cannot be read: {expected}" in said(chosen)


@pytest.mark.parametrize("chosen", ["cluster=bad", "experiment=bad", "model/decoder=bad"])
def test_a_file_of_many_bytes_is_refused_unread(own: Path, chosen: str):
    for group in ("cluster", "experiment", "model/decoder"):
        with (own.parent / "conf" / group / "bad.yaml").open("wb") as file:
            file.truncate(8 << 30)
    assert "bad.yaml cannot be read: it is larger than 1048576 bytes" in said(chosen)


def test_a_few_aliases_are_read(own: Path):
    (own.parent / "conf" / "cluster" / "aliased.yaml").write_text("name: &n aliased\npartition: *n\n")
    words = ["launch.config_dir=conf", "cluster=aliased", "task=mine"]
    assert compose_run(words).cluster.partition == "aliased"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("class Mine(Workload):", "class Mine(Workload)", "SyntaxError in"),
        ("from dataclasses", "raise RuntimeError('boom')\nfrom dataclasses", "RuntimeError in"),
        ("def training_class", "def other", "lacks training_class, which each workload must have"),
        ("    schema = Config", "    schema = Config\n    def __init__(self): raise ValueError('no')", "ValueError in"),
        ("    schema = Config", "    schema = dict", ".schema must be a subclass of hpcmm.config.schema.RunConfig"),
        ("@dataclass\n", "", ".schema must be a subclass of hpcmm.config.schema.RunConfig, and a @dataclass"),
        (
            "    schema = Config",
            "    schema = Config\n    def problems(self, c): return {}['x']",
            ".problems failed: KeyError",
        ),
        ("    schema = Config", "    schema = Config\n    def problems(self, c): pass", ".problems failed: TypeError"),
        ("(Workload)", "", "is not a workload"),
    ],
)
def test_a_wrong_workload_is_named_with_its_line(own: Path, before: str, after: str, expected: str):
    (own / "workload.py").write_text(WORKLOAD.replace(before, after))
    assert expected in said("task=mine")


def test_a_workload_that_imports_torch_at_its_top_is_told(own: Path):
    (own / "workload.py").write_text("import torch\n" + WORKLOAD)
    (own.parent / "torch.py").write_text("")  # as good as the real one, and loaded at once
    code = "from hpcmm.config.compose import compose_run; compose_run(['launch.config_dir=conf', 'task=mine'])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(own.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "imports torch at its top" in done.stderr


def test_what_the_task_has_no_use_for_is_said_so(own: Path):
    assert "model is a config group, but the chosen task has no use for it" in said("task=mine", "model=clip")
    assert "model is a config group, but the chosen task has no such key" in said("task=mine", "model.decoder=fcn")
    assert "width is not a configuration key" in said("width=3")


def test_a_class_in_a_broken_module_and_one_of_torch_are_not_called_missing(own: Path):
    (own / "decoders.py").write_text("class Wide(:\n")
    target = f"model.decoder._target_={own.name}.decoders.Wide"
    assert "decoders.py has a syntax error in line 1" in said(target)
    assert "that is not a Decoder" in said("model.decoder._target_=torch.nn.Linear")
    base = "hpcmm.workloads.anomaly.models.decoders.decoder.Decoder"
    assert "name a subclass of it" in said(f"model.decoder._target_={base}")
