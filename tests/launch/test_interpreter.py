"""The job's Python is asked at launch: what cannot run is refused in one sentence, what is not known is said."""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from other_pythons import VERSIONS, python_of

from hpcmm.config.compose import compose_run
from hpcmm.config.sweep import compose_points
from hpcmm.errors import HpcmmError
from hpcmm.launch import interpreter
from hpcmm.launch.interpreter import Interpreter, ask, check, with_python
from hpcmm.launch.job_imports import used_packages
from hpcmm.launch.plan import plan

SCRIPT = ["task=script", "task.path=train.py"]


def config_of(*overrides, here=Path("/")):
    return with_python(compose_run([*SCRIPT, *overrides]), here)


def asked(*overrides, here=Path("/")):
    return ask(config_of(*overrides, here=here).cluster)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_python(path, version="3, 9, 18", has=(), site="/nowhere"):
    listed = ", ".join(f'"{each}"' for each in has)
    return executable(path, f"""echo 'words of a site'; echo '[[{version}], ["{site}"], [{listed}]]'""")


@pytest.mark.parametrize("version", VERSIONS)
def test_each_python_tells_its_version_whatever_the_current_folder_holds(version, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('planted')\n")
    monkeypatch.chdir(tmp_path)
    found = asked("cluster=slurm", f"cluster.python={python_of(version)}")
    assert (found.version_text or "").startswith(f"{version}.")
    assert found.is_certain
    assert found.packages() is not None


def test_the_folder_of_an_environment_stands_for_its_python_and_links_stay(tmp_path):
    python = fake_python(tmp_path / "base" / "python3.9")
    (tmp_path / "my env" / "bin").mkdir(parents=True)
    (tmp_path / "my env" / "bin" / "python").symlink_to(python)
    for given in (f"{tmp_path}/my env", f"{tmp_path}/my env/bin/python", "my env", "./my env/bin/python"):
        config = config_of("cluster=slurm", f"cluster.python='{given}'", here=tmp_path)
        assert config.cluster.python == f"{tmp_path}/my env/bin/python"
        assert ask(config.cluster).version == (3, 9, 18)
    assert config_of("cluster=slurm", "cluster.python=python3", here=tmp_path).cluster.python == "python3"


NOT_FOUND = "but there is no such file on this machine: name a Python, or the folder of a venv or conda environment"


@pytest.mark.parametrize(
    ("cluster", "given", "said"),
    [
        ("slurm", "/nowhere/bin/python", f"{NOT_FOUND}. If it is on the nodes alone, "),
        ("local", "/nowhere/bin/python", f"{NOT_FOUND}."),
        ("slurm", "no-such-python", "which is not on the PATH of this machine: "),
        ("slurm", "{here}/empty", "a folder without bin/python: name "),
        ("slurm", "{here}/dangling", "a link that leads nowhere: name "),
        ("slurm", "{here}/closed", "which cannot be executed: name "),
        (
            "slurm",
            "{here}/silent",
            "which does not run as a Python here: exit status 0, and it said nothing of itself.",
        ),
        ("slurm", "{here}/broken", "which does not run as a Python here: exit status 127, no libpython"),
        ("slurm", "{here}/old", "which is Python 3.8.18, but ranks need 3.9 or later: "),
    ],
)
def test_what_can_run_no_rank_is_refused_in_one_sentence(tmp_path, cluster, given, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "closed").write_text("")
    executable(tmp_path / "silent", "true")
    executable(tmp_path / "broken", "echo no libpython >&2; exit 127")
    fake_python(tmp_path / "old", "3, 8, 18")
    with pytest.raises(HpcmmError) as refused:
        asked(f"cluster={cluster}", f"cluster.python={given.format(here=tmp_path)}")
    assert str(refused.value).startswith(f"cluster.python is {given.format(here=tmp_path)}, ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_python_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(interpreter, "_PATIENCE_S", 0.2)
    executable(tmp_path / "python", "exec sleep 600")
    with pytest.raises(HpcmmError, match=r"it gave no answer within 0\.2 s"):
        asked("cluster=slurm", f"cluster.python={tmp_path}/python")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("python", "may bring another one than this machine has"),
        ("/nowhere/python", "it is not on this machine"),
        ("{here}/broken", "does not run here"),
    ],
)
@pytest.mark.parametrize("brought", ["cluster.modules=[conda]", "cluster.setup=['conda activate mine']"])
def test_a_python_that_the_site_s_lines_bring_is_named_as_not_checked_and_not_refused(tmp_path, brought, given, why):
    executable(tmp_path / "broken", "exit 127")
    config = config_of("cluster=slurm", f"cluster.python={given.format(here=tmp_path)}", brought, "profile=nsys")
    found = ask(config.cluster)
    (said,) = check(config, found, ["torch"])
    assert why in said
    assert found.packages() is None


def test_a_container_s_python_is_not_asked_and_nothing_is_said_of_it():
    config = config_of("cluster=h100_apptainer", "profile=nsys")
    assert list(check(config, ask(config.cluster), ["torch"])) == []


def test_a_profiled_run_without_nvtx_is_refused_with_the_line_to_type(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    python = fake_python(tmp_path / "python")
    config = config_of("cluster=slurm", f"cluster.python={python}", "profile=nsys")
    with pytest.raises(HpcmmError, match=rf"^{python} does not have nvtx, .*: {python} -m pip install nvtx "):
        list(check(config, ask(config.cluster), []))
    config = config_of("cluster=slurm", f"cluster.python={python}")
    assert list(check(config, ask(config.cluster), [])) == []


@pytest.mark.parametrize(
    ("nsys", "nvtx", "is_said"),
    [
        ("2022.4.2", "0.2.15", True),
        ("2023.3.1", "0.2.12", True),
        ("2022.4.2", "0.2.11", False),
        ("2023.4.1", "0.2.15", False),
    ],
)
def test_an_nvtx_that_this_machine_s_nsys_records_nothing_of_is_named(tmp_path, monkeypatch, nsys, nvtx, is_said):
    executable(tmp_path / "bin" / "nsys", f"echo 'NVIDIA Nsight Systems version {nsys}.1-df9881f'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "site" / f"nvtx-{nvtx}.dist-info").mkdir(parents=True)
    python = fake_python(tmp_path / "python", has=["nvtx"], site=tmp_path / "site")
    config = config_of("cluster=slurm", f"cluster.python={python}", "profile=nsys")
    said = list(check(config, ask(config.cluster), []))
    assert len(said) == is_said
    assert not said or said[0].endswith(f"{python} -m pip install nvtx==0.2.11")
    required = config_of("cluster=slurm", f"cluster.python={python}", "profile=nsys", "profile.required=true")
    if is_said:
        with pytest.raises(HpcmmError, match=f"records nothing of nvtx {nvtx}"):
            list(check(required, ask(required.cluster), []))


def test_a_script_that_imports_torch_is_told_of_a_python_without_it(tmp_path):
    python = fake_python(tmp_path / "python")
    config = config_of("cluster=slurm", f"cluster.python={python}")
    (said,) = check(config, ask(config.cluster), ["torch"])
    assert said == f"the script imports torch, which {python} does not have: {python} -m pip install torch"


def test_a_workload_of_hpcmm_s_needs_what_it_imports(tmp_path):
    for version, words in (("3, 11, 7", "does not have torch, deepspeed"), ("3, 9, 18", "needs 3.11 or later")):
        python = fake_python(tmp_path / "python", version, has=["omegaconf", "yaml"])
        config = with_python(
            compose_run(["cluster=slurm", f"cluster.python={python}", "experiment=anomaly_demo"]), tmp_path
        )
        with pytest.raises(HpcmmError, match=words):
            list(check(config, ask(config.cluster), []))


def test_the_launcher_s_own_python_is_known_without_a_process():
    found = asked("cluster=slurm")
    assert found == Interpreter(sys.executable, sys.version_info[:3], tuple(sys.path), found.has, is_certain=True)


DEEPSPEED = {
    "import deepspeed": True,
    "from deepspeed.pipe import PipelineModule": True,
    "def main():\n    import deepspeed.comm as dist": True,
    "from helper import train": True,
    "from package import inside": True,
    "Trainer(args=TrainingArguments(deepspeed='ds.json'))": True,
    "Fabric(strategy='deepspeed_stage_2')": True,
    "from accelerate import DeepSpeedPlugin": True,
    "import torch": False,
    "'''It needs no deepspeed at all.'''\nimport torch": False,
    "import other": False,
}


@pytest.mark.parametrize("text", DEEPSPEED)
def test_whether_deepspeed_is_used_is_told_by_what_the_script_imports_in_turn(tmp_path, text):
    files = {
        "train.py": text,
        "helper.py": "from . import nothing\nimport deeper",
        "deeper.py": "import deepspeed",
        "package/__init__.py": "",
        "package/inside.py": "from .beside import x",
        "package/beside.py": "import deepspeed",
        "other.py": "import train",
        "unused.py": "import deepspeed",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert ("deepspeed" in used_packages([tmp_path / "train.py"], [tmp_path])) is DEEPSPEED[text]
    assert "deepspeed" in used_packages([tmp_path / "other.py"], [tmp_path], ["--deepspeed", "ds.json"])


@pytest.mark.parametrize(
    ("command", "imports_deepspeed"),
    {
        "sh -c 'exec python -u train.py --rank 1'": True,
        "sh -c 'python plain.py'": False,
        "./run.sh": True,
        "./plain.sh": False,
        "torchrun --nproc-per-node 2 plain.py": False,
        "sh -c 'deepspeed plain.py'": True,
        "env python plain.py": False,
    }.items(),
)
def test_deepspeeds_ops_are_compiled_only_if_what_a_program_runs_imports_it(
    tmp_path, monkeypatch, command, imports_deepspeed
):
    files = {
        "train.py": "import helper",
        "helper.py": "import deepspeed",
        "plain.py": "import math",
        "run.sh": "#!/bin/sh\npython train.py\n",
        "plain.sh": "#!/bin/sh\npython plain.py\n",
        "torchrun": "",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["cluster=local", f"runs_root={tmp_path}/runs", "cluster.ranks_per_node=1", "--", *shlex.split(command)]
    planned = plan(compose_points(words), words)
    assert ("deepspeed" in planned.packages) is imports_deepspeed


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["experiment=anomaly_demo"], True),
        (["experiment=anomaly_demo", "cluster.modules=[torch]"], False),
        (["experiment=anomaly_demo", "cluster.environment.PYTHONPATH=/packages"], False),
        (["task=script", "task.path=train.py"], False),
    ],
)
def test_hpcmm_without_its_extra_runs_no_workload_but_scripts(words, refused, monkeypatch):
    monkeypatch.setattr(interpreter, "find_spec", lambda name: name in ("omegaconf", "yaml", "nvtx") or None)
    all_of_it = frozenset({"torch", "deepspeed", "omegaconf", "yaml"})
    monkeypatch.setattr(interpreter, "_answer", lambda python, _: Interpreter(python, (3, 11, 7), has=all_of_it))
    config = compose_run(["cluster=slurm", *words])
    needed = re.escape(
        f"{sys.executable} does not have torch, deepspeed, which this workload needs: install hpcmm with"
    )
    with pytest.raises(HpcmmError, match=needed) if refused else nullcontext():
        interpreter.require_packages(config, ask(config.cluster))


@pytest.mark.parametrize("own", [True, False])
def test_fp8_asks_for_torchao_and_names_the_extra_that_brings_it(own, monkeypatch):
    has = frozenset({"torch", "deepspeed", "omegaconf", "yaml"})
    monkeypatch.setattr(interpreter, "find_spec", lambda name: name in has or None)
    monkeypatch.setattr(interpreter, "_answer", lambda python, _: Interpreter(python, (3, 11, 7), has=has))
    python = [] if own else [f"cluster.python={sys.executable}"]
    config = compose_run(["cluster=slurm", "task=omni", "parallel.precision=fp8", *python])
    with pytest.raises(HpcmmError, match=r"not have torchao, which this workload needs: .* extras, train and fp8"):
        if own:
            interpreter.require_packages(config, ask(config.cluster))
        else:
            list(interpreter.check(config, ask(config.cluster), []))
    bf16 = compose_run(["cluster=slurm", "task=omni", "parallel.precision=bf16", *python])
    interpreter.require_packages(bf16, ask(bf16.cluster))
    assert list(interpreter.check(bf16, ask(bf16.cluster), [])) == []
