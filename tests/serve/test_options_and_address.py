"""Options that are checked, runs that are found by name, addresses that only their owner reads."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.config.schema import FUNCTION, TaskConfig
from hpcmm.config.workload import Workload
from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.serve import __main__ as command
from hpcmm.serve.address import Address, find_address, find_served_run, new_token, read_address, write_address
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.served import ServedModel
from hpcmm.workloads.anomaly.page.served import PageOptions
from hpcmm.workloads.anomaly.workload import AnomalyWorkload

OF_THE_PAGE = {field.name for field in fields(PageOptions)}


def serve(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "hpcmm.serve", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )


@pytest.fixture
def runs(tmp_path):
    """Two runs of one name with checkpoints, a newer one without, and a sweep of a point."""
    for name, trained in (("demo-1", True), ("demo-2", True), ("demo-3", False), ("sweep-1/0000", True)):
        run = RunDir(tmp_path / "runs" / name)
        run.create()
        run.submission_script.touch()
        if trained:
            (run.checkpoints / "latest").write_text("step_1")
    sweep = RunDir(tmp_path / "runs" / "sweep-1")
    sweep.submission_script.touch()
    (sweep.root / "ledger.json").write_text(json.dumps({"points": []}))
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": -1}, "--port"), ({"port": 70_000}, "--port"), ({"threshold": 1.2}, "--threshold"),
        ({"threshold": float("nan")}, "--threshold"), ({"max_batch": 0}, "--max-batch"),
        ({"max_files": 10**9}, "--max-files"),
        ({"max_wait_ms": -1.0}, "--max-wait-ms"), ({"max_upload_mb": float("inf")}, "--max-upload-mb"),
        ({"max_megapixels": 0.0}, "--max-megapixels"), ({"max_waiting": 0}, "--max-waiting"),
    ],
)  # fmt: skip
def test_a_limit_that_is_none_is_refused_by_its_name(given, said):
    with pytest.raises(HpcmmError, match=f"^{said} is "):
        PageOptions(**given) if set(given) <= OF_THE_PAGE else ServeOptions(run="/nowhere", **given)


def test_options_go_through_a_configuration_file_unchanged():
    options = ServeOptions(run="/a b", port=7, max_wait_ms=0.0, page=asdict(PageOptions(threshold=0.25)))
    assert ServeOptions.of(json.loads(json.dumps(options.values()))) == options
    assert PageOptions(**options.page).threshold == 0.25


def test_a_job_reads_its_options_from_the_frozen_configuration(tmp_path):
    options = ServeOptions(run="/a b", port=7, max_files=3, page=asdict(PageOptions(threshold=0.5)))
    task = TaskConfig(name=FUNCTION, target="hpcmm.serve.job:serve_in_job", kwargs=options.values())
    config_file.dump(replace(compose_run(["cluster=local", "task=function"]), task=task), tmp_path / "config.yaml")
    assert ServeOptions.of(config_file.load(tmp_path / "config.yaml").task.kwargs) == options


def test_a_run_is_found_by_name_start_path_and_point_of_a_sweep(runs):
    assert find_served_run("demo-1", runs).root == runs / "demo-1"
    assert find_served_run("demo", runs).root == runs / "demo-2"  # the newest with a checkpoint
    assert find_served_run(str(runs / "demo-1"), runs).root == runs / "demo-1"
    assert find_served_run("sweep-1/0000", runs).root == runs / "sweep-1" / "0000"


@pytest.mark.parametrize(
    ("asked", "said"),
    [("demo-3", "has the run trained to its end"), ("nothing", "is not a run in"),
     ("sweep-1", "name one of its points"),
     ("../../etc", "is not a run in"), ("123", "is not known")],
)  # fmt: skip
def test_what_cannot_be_served_is_said(asked, said, runs):
    with pytest.raises(HpcmmError, match=said):
        find_served_run(asked, runs)


def test_an_address_is_read_by_its_owner_alone(runs):
    address = Address("node1", 12_345, new_token())
    run = RunDir(runs / "demo-1")
    with pytest.raises(HpcmmError, match="No server of demo-1 answers"):
        find_address("demo-1", runs)
    write_address(run.address, address)
    assert stat.S_IMODE(run.address.stat().st_mode) == 0o600
    assert read_address(run.address) == address == find_address("demo-1", runs)
    assert address.tunnel("me@login") == "ssh -N -L 12345:127.0.0.1:12345 -J me@login node1"
    assert address.url == f"http://127.0.0.1:12345/?token={address.token}"
    run.address.write_text("{")
    with pytest.raises(HpcmmError, match="does not tell where a server listens"):
        read_address(run.address)


def test_tokens_are_long_and_never_the_same():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 43


def test_mistakes_on_the_command_line_are_one_sentence(runs):
    for arguments, said in (
        (["nothing"], "is not a run in"),
        (["demo-1", "--port", "99999"], "a port is a number up to 65535"),
        (["demo-1", "cluster.nodes=1"], "is for a Slurm job"),
        (["demo-1", "--cluster", "nowhere"], "cluster=nowhere is not an option of the group cluster"),
        (["demo-1", "--cluster", "local"], "has no Slurm"),
        (["demo-1", "--address"], "No server of demo-1 answers"),
    ):
        done = serve(*arguments, "--runs-root", str(runs))
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr
        assert done.stderr.startswith("hpcmm.serve: ")
        assert "Traceback" not in done.stderr


class Chat(ServedModel):
    """The page of another workload, with one option."""

    def add_options(self, parser):
        parser.add_argument("--tone", default="plain")

    def options(self, given):
        return {"tone": given.tone}

    def build_model(self, config):
        raise NotImplementedError

    def load(self, model, run, config, options):
        raise NotImplementedError


class Talker(Workload):
    def training_class(self):
        raise NotImplementedError

    def served(self):
        return Chat()


@pytest.fixture
def served_with(runs, monkeypatch):
    """What a server of demo-1 is started with, when its configuration names a workload."""
    (runs / "demo-1" / "config.yaml").write_text("name: demo\ncluster: {name: local}\n")
    started = []
    monkeypatch.setattr("hpcmm.serve.server.serve", lambda options, _: started.append(options))

    def serve_run(workload, *arguments):
        monkeypatch.setattr(command, "workload_of", lambda _: workload)
        status = command.main([*arguments, "--runs-root", str(runs)])
        return status, started.pop() if started else None

    return serve_run


def test_a_page_s_own_options_come_from_the_run_s_workload(served_with, capsys):
    for arguments in (["demo-1", "--tone", "warm"], ["--tone", "warm", "demo-1", "--max-batch", "2"]):
        status, options = served_with(Talker(), *arguments)
        assert (status, options.page) == (0, {"tone": "warm"})
    assert options.max_batch == 2
    with pytest.raises(SystemExit):
        served_with(Talker(), "demo-1", "--threshold", "0.5")
    assert "unrecognized arguments: --threshold" in capsys.readouterr().err
    status, options = served_with(AnomalyWorkload(), "demo-1", "--threshold", "0.5", "--max-files", "3")
    assert (status, options.page, options.max_files) == (0, {"threshold": 0.5}, 3)


def test_a_run_of_a_user_s_script_has_no_page(served_with, capsys):
    assert served_with(None, "demo-1") == (1, None)
    assert "has no page to serve" in capsys.readouterr().err


def test_help_takes_no_torch():
    code = (
        "import sys\nfrom hpcmm.serve.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([n for n in ('torch', 'gradio', 'hydra', 'submitit') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_settings_of_the_job_may_stand_behind_options(tmp_path):
    done = serve("no_such_run", "--cluster", "a30", "cluster.time_limit_min=120", cwd=tmp_path)
    assert done.returncode == 1
    assert "no_such_run" in done.stderr
    assert "unrecognized" not in done.stderr


@pytest.mark.parametrize(
    "given",
    [
        {"node": "node1; id", "port": 80, "token": "x"},
        {"node": "node1", "port": 0, "token": "x"},
        {"node": "node1", "port": 1e999, "token": "x"},
        {"node": "node1", "port": 80, "token": "x\x1b[31m"},
        {"node": "-oProxyCommand=id", "port": 80, "token": "x"},
        [1],
    ],
)
def test_an_address_that_a_shell_could_not_take_is_none(tmp_path, given):
    (tmp_path / "address.json").write_text(json.dumps(given))
    with pytest.raises(HpcmmError, match="does not tell where a server listens"):
        read_address(tmp_path / "address.json")
