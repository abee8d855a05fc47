"""Where Slurm gives the doctor no nodes: what it said, once, and what to do. What others wrote is not obeyed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import another_user
import psutil
import pytest

from hpcmm.config.compose import compose_run
from hpcmm.doctor.__main__ import main
from hpcmm.doctor.node import _leave_token, interfaces, token_file
from hpcmm.doctor.node import main as answer
from hpcmm.doctor.runner import check_nodes, clean_up, python_of_nodes, read_answers, write_request
from hpcmm.errors import HpcmmError
from hpcmm.resources import environment_of_modules

MUNGE = "srun: error: If munged is up, restart with --num-threads=10\nsrun: error: Munge encode failed: no socket\n"


def doctor(tmp_path: Path, *, says: str, configuration: bool = True) -> subprocess.CompletedProcess[str]:
    """The doctor beside a srun that says ``says`` and fails."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text(f"#!/bin/sh\nprintf '{says}' >&2\nexit 1\n")
    (commands / "srun").chmod(0o755)
    if configuration:
        (tmp_path / "slurm.conf").touch()
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_CONF": f"{tmp_path}/slurm.conf", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "hpcmm.doctor", "cluster=slurm", "--nodes", "3", "--no-nsys", "runs_root=."]
    return subprocess.run(
        command, cwd=tmp_path, env=environment_of_modules(environment), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (2 * MUNGE, "=10; Munge encode failed: no socket. The cluster is not up, or munge is not running here"),
        ("srun: error: Node count specification invalid\n", "invalid. Asked for are 3 nodes"),
        ("srun: error: Something new.\n", "No node was checked: Something new."),
        ("", "No node was checked: srun said nothing."),
    ],
)
def test_what_slurm_said_is_told_once_with_its_remedy(tmp_path, says, told):
    done = doctor(tmp_path, says=says.replace("\n", "\\n"))
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.count("Munge encode failed") <= 1


def test_without_slurm_s_configuration_it_does_not_wait_for_it(tmp_path):
    done = doctor(tmp_path, says="", configuration=False)
    assert done.returncode == 1
    assert "which is not a file: is the cluster up" in done.stderr


def test_one_node_is_checked_and_nothing_stays(tmp_path):
    srun = [
        "sh",
        "-c",
        'for last; do :; done; while [ "${1##*/}" != start.py ]; do shift; done; exec "$PYTHON" "$@"',
        "srun",
    ]
    environ = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "SLURMD_NODENAME": "n1", "HOME": str(tmp_path)}
    folders = [tmp_path / "runs", tmp_path / "cache"]
    result = check_nodes(["n1"], 1, folders, srun, nsys=False, environ=environ)
    assert result.complaint == ""
    assert result.found["n1"]["shared"] == {str(folder): [] for folder in folders}
    assert [[*folder.iterdir()] for folder in folders] == [[], []]


def test_the_nodes_run_the_job_s_python_behind_the_site_s_lines(tmp_path):
    assert python_of_nodes(compose_run(["cluster=slurm"]).cluster) == [sys.executable]
    assert python_of_nodes(compose_run(["cluster=h100_apptainer"]).cluster) == [sys.executable]  # it runs outside
    (tmp_path / "python").write_text("#!/bin/sh\necho $FROM_SITE $FROM_MODULE $*\n")
    (tmp_path / "python").chmod(0o755)
    cluster = compose_run(["cluster=slurm", "cluster.python=python", "cluster.modules=['cuda/12 x']"]).cluster
    cluster.setup = ["export FROM_SITE=1", f"PATH={tmp_path}:$PATH"]
    environ = {"PATH": "/usr/bin:/bin", "BASH_FUNC_module%%": '() { export FROM_MODULE="$*"; }'}
    command = [*python_of_nodes(cluster), "a b", "c"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == "1 load cuda/12 x a b c\n", done.stderr
    cluster.setup = ["false"]
    assert subprocess.run([*python_of_nodes(cluster), "x"], env=environ, check=False).returncode == 1


@pytest.mark.parametrize("given", ["/nowhere/bin/python", "no-such-python"])
def test_a_python_that_is_not_there_is_no_fit_machine(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert main(["cluster=slurm", f"cluster.python={given}"]) == 1
    assert capsys.readouterr().err.startswith(f"hpcmm.doctor: cluster.python is {given}, ")


def test_this_machine_is_looked_at_by_the_job_s_python(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    venv.create(tmp_path / "own", symlinks=True)  # without a package
    words = [f"cluster.cache_dir={tmp_path}/cache", f"cluster.python={tmp_path}/own", "--json"]
    assert main(["cluster=local", *words]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["nodes"].values()
    assert facts["python"]["prefix"] == str(tmp_path / "own")


def test_an_interface_has_the_addresses_and_the_size_that_psutil_finds():
    families = (socket.AF_INET, socket.AF_INET6)
    listed = [each.address for each in psutil.net_if_addrs()["lo"] if each.family in families]
    found = interfaces()["lo"]  # the others of a machine come and go
    assert (sorted(found["addresses"]), found["mtu"]) == (sorted(listed), psutil.net_if_stats()["lo"].mtu)


@pytest.fixture
def request_file(tmp_path):
    return write_request(["n1"], [tmp_path / "runs"], nsys=False)


def test_what_is_removed_is_not_read_from_the_request(tmp_path, request_file):
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("thesis", ".hpcmm-doctor-a-b"):
        (precious / name).touch()
    assert request_file.parent.stat().st_mode & 0o777 == 0o700
    request_file.write_text(json.dumps({"id": "*", "folders": [str(precious)]}))
    clean_up(request_file, [tmp_path / "runs"])
    assert len([*precious.iterdir()]) == 2
    assert [*(tmp_path / "runs").iterdir()] == []


ANSWERS = [
    "[]", "7", "{", "[" * 200_000, '{"names": 1}', '{"names": {"n1": "1.1.1.1"}}', '{"python": [], "packages": 1}',
    '{"python": {"version": 1}, "packages": {}, "names": {}, "interfaces": {}, "infiniband": {}, "gpus": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_of_another_shape_counts_as_none(request_file, text):
    (request_file.parent / "n1.json").write_text(text)
    assert read_answers(request_file, ["n1"]).found == {"n1": {}}
    assert read_answers(request_file, None).nodes == []


def test_an_answer_that_another_user_could_have_written_counts_as_none(request_file, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert answer([str(request_file)]) == 0
    assert read_answers(request_file, ["n1"]).found["n1"]["node"] == "n1"
    (request_file.parent / "n1.json").chmod(0o666)
    assert read_answers(request_file, ["n1"]).found == {"n1": {}}
    another_user.give(request_file.parent)
    assert read_answers(request_file, ["n1"]).found == {"n1": {}}


@pytest.mark.parametrize("place", ["folder", "file", "owner"])
def test_a_node_does_not_do_what_another_user_could_have_asked(request_file, place):
    if place == "owner":
        another_user.give(request_file.parent)
    else:
        (request_file if place == "file" else request_file.parent).chmod(0o777)
    with pytest.raises(HpcmmError, match="can be written by another user, so what it asks is not done"):
        answer([str(request_file)])


@pytest.mark.parametrize("text", ["[]", "{}", '{"folders": [1]}', '{"nodes": "n1", "folders": []}', "[" * 200_000])
def test_a_request_of_another_shape_is_refused(request_file, text):
    request_file.write_text(text)
    with pytest.raises(HpcmmError, match="is no request of a check"):
        answer([str(request_file)])


@pytest.fixture
def open_to_all():
    """A folder that other users can enter and write, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o777)
        yield Path(made)


def test_a_node_makes_no_folder_where_everybody_could_exchange_it(open_to_all):
    found: dict[str, object] = {}
    _leave_token(token_file(open_to_all / "cache", "ab", "secret", "n1"), "n1", found)
    assert "can be written by everybody" in str(found["unwritable"])
    assert [*open_to_all.iterdir()] == []


def test_a_folder_that_everybody_could_exchange_carries_no_nodes_words(open_to_all):
    done = doctor(open_to_all, says="")
    assert done.returncode == 1
    assert "another user could put a run in the place of yours" in done.stderr
    assert sorted(each.name for each in open_to_all.iterdir()) == ["bin", "slurm.conf"]
