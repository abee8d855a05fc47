"""The command: where it writes, what it never overwrites, what it says without Slurm, and what it asks."""

import builtins
import os
import sys
from pathlib import Path

import pytest
import yaml

from hpcmm.config.compose import compose_run
from hpcmm.init.__main__ import main
from hpcmm.init.site import ask_site

CONFIG = """\
Configuration data as of 2024-06-01T00:00:00
AccountingStorageEnforce = associations,limits
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = Lab
SelectType              = select/cons_tres
SelectTypeParameters    = CR_CORE_MEMORY
SLURM_VERSION           = 24.05.3

Slurmctld(primary) at head is UP
"""
NODES = "".join(
    f"NodeName=n{number} Arch=x86_64 CoresPerSocket=32  CPUAlloc=0 CPUEfctv=64 CPUTot=64 Gres=gpu:a100:4(S:0-1) "
    "RealMemory=515000 AllocMem=0 Sockets=2 Boards=1 State=IDLE ThreadsPerCore=1 Partitions=gpu \n"
    for number in range(3)
)
PARTITIONS = (
    "PartitionName=gpu AllowAccounts=ALL AllowQos=ALL Default=YES DefaultTime=01:00:00 MaxTime=1-00:00:00 State=UP\n"
)
SINFO = """\
for word; do case $word in --format=*) asked=${word#--format=};; esac; done
part=${asked%%\\%*}
for field in "" n7 'gpu*' gpu:8 64 2 32 515000 idle up infinite 1:00:00 "
"; do printf '%s%s' "$field" "$part"; done
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch) -> Path:
    """A folder of stand-ins for Slurm's commands, alone on the PATH; the config folders are the test's own."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"config": CONFIG, "nodes": NODES, "partitions": PARTITIONS}.items():
        (tmp_path / name).write_text(text)
    shown = "".join(f"*{what[:-1]}) /bin/cat {tmp_path}/{what};; " for what in ("nodes", "partitions"))
    stand_in(commands, "scontrol", f'case "$*" in *config) /bin/cat {tmp_path}/config;; {shown} *) exit 1;; esac')
    associations = 'echo "chem||normal|normal|"; echo "bio||normal|normal|"'
    stand_in(commands, "sacctmgr", f'case "$*" in *associations*) {associations};; *user*) echo bio;; esac')
    stand_in(commands, "srun", "echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1")
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("LOADEDMODULES", raising=False)
    for name in ("SCRATCH", "WORK", "WORKDIR", "PROJECT", "WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return commands


def stand_in(commands: Path, name: str, script: str) -> None:
    (commands / name).write_text(f"#!/bin/sh\n{script}\n")
    (commands / name).chmod(0o755)


def home(tmp_path: Path, name: str = "lab") -> Path:
    return tmp_path / "xdg" / "hpcmm" / "conf" / "cluster" / f"{name}.yaml"


def init(*words: str) -> int:
    return main(["--yes", "--no-check", *words])


def test_the_file_is_found_by_its_name_afterwards(slurm, tmp_path, capsys):
    assert init() == 0
    assert f"written:  {home(tmp_path)}\n" in capsys.readouterr().out
    cluster = compose_run(["cluster=lab"]).cluster
    assert (cluster.name, cluster.partition, cluster.account) == ("lab", "gpu", "bio")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.cpus_per_rank, cluster.memory_gb) == (2, 4, 16, 502)


def test_a_file_that_is_there_is_not_overwritten(slurm, tmp_path, capsys):
    home(tmp_path).parent.mkdir(parents=True)
    home(tmp_path).symlink_to(tmp_path / "gone")
    assert init() == 1
    assert capsys.readouterr().err.startswith(f"hpcmm.init: {home(tmp_path)} is there already: --force replaces it")
    assert home(tmp_path).is_symlink()
    assert init("--force") == 0
    assert not home(tmp_path).is_symlink()
    assert init("--name", "other") == 0
    assert home(tmp_path, "other").is_file()


def test_out_is_a_folder_of_config_groups_or_a_file_in_one(slurm, tmp_path, capsys):
    assert init("--out", "mine") == 0
    assert f"python -m hpcmm.doctor --config-dir {tmp_path}/mine cluster=lab" in capsys.readouterr().out
    assert init("--out", "mine/cluster/second.yaml") == 0
    assert yaml.safe_load((tmp_path / "mine" / "cluster" / "second.yaml").read_text())["name"] == "second"
    assert init("--out", "third.yaml") == 1
    assert "third.yaml is in no folder named cluster" in capsys.readouterr().err
    assert init("--out", "mine/cluster/fourth.yaml", "--name", "fifth") == 1
    assert "cluster=fifth is searched in fifth.yaml" in capsys.readouterr().err


def test_print_writes_nothing(slurm, tmp_path, capsys):
    assert main(["--print"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "lab"
    assert not (tmp_path / "xdg").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "slurm"], "hpcmm has a cluster/slurm.yaml of its own"),
        (["--name", "../x"], "../x cannot be a cluster's name"),
        (["--partition", "$(x)"], "--partition $(x) cannot be a name of Slurm's"),
        (["--partition", "cpu"], "cpu is not a partition here: choose one of gpu"),
        (["--account", "law"], "law is not an account of yours there: choose one of chem, bio"),
        (["--time-limit-min", "2000"], "is too long. Most: 1440 by partition gpu"),
        (["--nodes", "4"], "4 nodes are too many: gpu has 3."),
        (["--modules", "a;b"], "--modules: a;b cannot be a module's name"),
        (["--interface", "eth0 x"], "--interface eth0 x cannot be"),
        (["--gpus-per-node", "2", "--ranks-per-node", "3"], "cluster.ranks_per_node is 3 and gpus_per_node is 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(slurm, capsys, words, said):
    assert init(*words) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("hpcmm.init: ")


def test_every_answer_can_be_given_as_an_option(slurm, tmp_path):
    words = (
        "--partition gpu --account chem --qos normal --nodes 3 --gpus-per-node 2 --gpu-type a100 --cpus-per-rank 8 "
        "--memory-gb 100 --time-limit-min 30 --modules gcc/12,cuda/12.4 --interface ib0 --cache-dir /shared/cache"
    )
    assert init(*words.split()) == 0
    said = yaml.safe_load(home(tmp_path).read_text())
    assert said == {
        "name": "lab", "executor": "slurm", "partition": "gpu", "account": "chem", "qos": "normal", "nodes": 3,
        "ranks_per_node": 2, "gpus_per_node": 2, "cpus_per_rank": 8, "memory_gb": 100, "time_limit_min": 30,
        "modules": ["gcc/12", "cuda/12.4"], "cache_dir": "/shared/cache",
        "environment": {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"},
    }  # fmt: skip


def test_a_folder_for_all_runs_is_part_of_the_file(slurm, tmp_path):
    assert init("--runs-root", "/shared/my runs") == 0
    config = compose_run(["cluster=lab"])
    assert (config.runs_root, config.cluster.partition) == ("/shared/my runs", "gpu")
    assert compose_run(["cluster=lab", "runs_root=here"]).runs_root == "here"


def test_loaded_modules_and_the_way_to_the_cluster_are_kept(slurm, tmp_path, monkeypatch):
    (tmp_path / "slurm.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setenv("LOADEDMODULES", "gcc/12:$(reboot):cuda/12.4")
    assert init() == 0
    said = yaml.safe_load(home(tmp_path).read_text())
    assert said["modules"] == ["gcc/12", "cuda/12.4"]
    assert said["submit_environment"] == {"SLURM_CONF": str(tmp_path / "slurm.conf")}


def test_the_python_that_trains_is_asked_and_kept(slurm, tmp_path, capsys):
    environment = tmp_path / "train"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    assert init("--python", "train") == 0
    assert compose_run(["cluster=lab"]).cluster.python == str(environment)
    assert init("--name", "other", "--python", "./nowhere") == 1
    assert f"cluster.python is {tmp_path}/nowhere, but there is no such file" in capsys.readouterr().err
    assert not home(tmp_path, "other").exists()


def test_without_slurm_a_sentence_says_what_to_do(slurm, capsys):
    (slurm / "scontrol").unlink()
    assert init() == 1
    error = capsys.readouterr().err
    assert error.startswith("hpcmm.init: Slurm does not answer (scontrol is not found here): run this on a login node")
    assert "cluster=local needs no file" in error


def test_a_configuration_that_is_gone_is_not_waited_for(slurm, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_CONF", "/gone/slurm.conf")
    assert init() == 1
    assert "SLURM_CONF is /gone/slurm.conf, which is not a file" in capsys.readouterr().err


def test_a_site_without_accounting_needs_no_account(slurm, tmp_path):
    (tmp_path / "config").write_text(
        CONFIG.replace("accounting_storage/slurmdbd", "(null)").replace("associations,limits", "none")
    )
    assert init() == 0
    assert "Yours are not known (this cluster keeps no accounts)" in " ".join(home(tmp_path).read_text().split("\n# "))


def test_if_sacctmgr_refuses_sshare_tells_the_accounts(slurm, tmp_path):
    stand_in(slurm, "sacctmgr", "echo 'sacctmgr: error: Access/permission denied' >&2; exit 1")
    stand_in(slurm, "sshare", "echo bio; echo ' chem '; echo 'evil\x1b[31m'")
    assert [each.account for each in ask_site().accounting.associations] == ["bio", "chem"]
    (slurm / "sshare").unlink()
    assert ask_site().accounting.associations == ()
    assert "permission denied" in ask_site().accounting.problem
    assert init() == 0
    assert "account" not in yaml.safe_load(home(tmp_path).read_text())


def test_if_scontrol_tells_no_nodes_sinfo_does(slurm, tmp_path):
    (tmp_path / "nodes").write_text("")
    stand_in(slurm, "sinfo", SINFO)
    assert init() == 0
    said = yaml.safe_load(home(tmp_path).read_text())
    assert (said["partition"], said["nodes"], said["gpus_per_node"], said["time_limit_min"]) == ("gpu", 1, 8, 60)


@pytest.mark.parametrize(
    ("of_site", "of_partition", "memory_gb"),
    [
        ("MaxMemPerCPU = 4000", "MaxMemPerNode=UNLIMITED", 250),
        ("MaxMemPerNode = 100000", "MaxMemPerNode=UNLIMITED", 97),
        ("MaxMemPerNode = UNLIMITED", "MaxMemPerNode=UNLIMITED", 502),
        ("MaxMemPerNode = 100000", "MaxMemPerCPU=4000", 250),
    ],
)
def test_memory_is_within_what_the_partition_gives_or_else_the_site(slurm, tmp_path, of_site, of_partition, memory_gb):
    (tmp_path / "config").write_text(CONFIG.replace("SelectType ", f"{of_site}\nSelectType "))
    (tmp_path / "partitions").write_text(PARTITIONS.replace("State=UP", f"State=UP {of_partition}"))
    assert init() == 0
    assert yaml.safe_load(home(tmp_path).read_text())["memory_gb"] == memory_gb


@pytest.mark.parametrize("clusters", ["big,small", "all"])
def test_several_clusters_at_once_are_refused(slurm, tmp_path, monkeypatch, capsys, clusters):
    monkeypatch.setenv("SLURM_CLUSTERS", clusters)
    assert init() == 1
    assert f"SLURM_CLUSTERS is {clusters}, but a file describes one cluster: set it to one." in capsys.readouterr().err
    assert not home(tmp_path).exists()


def test_what_to_type_next_runs_a_script(slurm, tmp_path, capsys):
    assert init("--name", "lab") == 0
    next_line = capsys.readouterr().out.splitlines()[-1]
    assert next_line == "next:     python -m hpcmm.launch cluster=lab profile=nsys analyze=after -- train.py"


def test_no_partition_at_all_is_said(slurm, tmp_path, capsys):
    (tmp_path / "partitions").write_text("No partitions in the system\n")
    stand_in(slurm, "sinfo", "exit 0")
    assert init() == 1
    assert "Slurm shows you no partition" in capsys.readouterr().err


def test_a_file_that_no_free_node_could_check_is_good_and_said_to_be_unchecked(slurm, tmp_path, capsys):
    assert main(["--yes", "--wait", "1"]) == 0
    shown = capsys.readouterr()
    assert "The file is not checked" in shown.out
    assert "nodes are busy" in shown.err
    assert home(tmp_path).is_file()
    assert not (tmp_path / "runs").exists()


def test_a_check_that_slurm_refuses_fails_and_leaves_the_file_to_be_changed(slurm, tmp_path, capsys):
    stand_in(slurm, "srun", "echo 'srun: error: Unable to allocate resources: Invalid account or account/partition "
             "combination specified' >&2; exit 1")  # fmt: skip
    assert main(["--yes"]) == 1
    shown = capsys.readouterr()
    assert "cluster.account is bio and cluster.partition gpu" in shown.err
    assert home(tmp_path).is_file()


def test_the_checks_job_asks_for_gpus_as_the_file_does(slurm, tmp_path):
    (tmp_path / "config").write_text(CONFIG.replace("cons_tres", "cons_res"))
    stand_in(slurm, "srun", f'echo "$@" > {tmp_path}/asked; exit 1')
    main(["--yes"])
    assert "--gres=gpu:4" in (tmp_path / "asked").read_text().split()


@pytest.fixture
def answers(monkeypatch) -> list[str]:
    """What the user types on a terminal, line by line."""
    typed: list[str] = []

    def answer(_question: str) -> str:
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    return typed


def test_on_a_terminal_the_answers_count_and_enter_takes_what_is_proposed(slurm, tmp_path, answers, capsys):
    answers += ["cpu", "gpu", "chem", "", "x", "90", "slurm", "mine", "yes"]
    assert main(["--no-check"]) == 0
    said = yaml.safe_load(home(tmp_path, "mine").read_text())
    assert (said["account"], said["nodes"], said["time_limit_min"], said["name"]) == ("chem", 2, 90, "mine")
    shown = capsys.readouterr().out
    for refused in ("Choose one of gpu.", "Give a number from 1 on.", "hpcmm has a cluster/slurm.yaml of its own"):
        assert refused in shown


def test_on_a_terminal_a_dash_means_no_account(slurm, tmp_path, answers):
    answers += ["", "-", "", "", "", "yes"]
    assert main(["--no-check"]) == 0
    assert "account" not in yaml.safe_load(home(tmp_path).read_text())


def test_on_a_terminal_nothing_is_written_without_a_yes(slurm, tmp_path, answers, capsys):
    answers += [""] * 5 + ["no"]
    assert main(["--no-check"]) == 1
    answers += [""] * 3
    assert main(["--no-check"]) == 1
    assert "The answers have ended, so nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "xdg").exists()


def test_a_folder_that_others_own_is_not_written(slurm, tmp_path, capsys):
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's folder")
    (tmp_path / "theirs" / "cluster").mkdir(parents=True)
    os.chown(tmp_path / "theirs" / "cluster", 4321, 4321)
    assert init("--out", "theirs") == 1
    assert "is another user's" in capsys.readouterr().err
