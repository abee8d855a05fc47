"""The one-machine Slurm cluster is a real one, can be broken and mended, and leaves nothing behind."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import SlurmCluster

pytestmark = pytest.mark.slurm

NODE_COUNT = 4
GPUS_PER_NODE = 2
TRANSFER_BYTES = 4_000_000
RATE_BITS = 10_000_000

TRANSFER = """
import os, pathlib, socket, sys, time
meeting_point, sender, total = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if socket.gethostname() == sender:
    deadline = time.monotonic() + 60
    while not meeting_point.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    host, port = meeting_point.read_text().split()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        begin = time.monotonic()
        connection.sendall(bytes(total))
        connection.shutdown(socket.SHUT_WR)
        received = int(connection.recv(64))
        print(received, time.monotonic() - begin)
else:
    with socket.create_server((socket.gethostname(), 0)) as server:
        server.settimeout(60)
        draft = meeting_point.with_suffix(".draft")
        draft.write_text(f"{socket.gethostname()} {server.getsockname()[1]}")
        draft.rename(meeting_point)
        connection, _ = server.accept()
        received = 0
        while chunk := connection.recv(65536):
            received += len(chunk)
        connection.sendall(str(received).encode())
"""


def transfer_s(cluster: SlurmCluster, sender: str, receiver: str) -> float:
    """Seconds that a TCP transfer of TRANSFER_BYTES takes from node to node."""
    with tempfile.TemporaryDirectory() as folder:
        place = ("srun", "--nodes=2", "--ntasks=2", f"--nodelist={sender},{receiver}", "--time=3")
        program = (sys.executable, "-c", TRANSFER, f"{folder}/address", sender, str(TRANSFER_BYTES))
        received, seconds = cluster.run(*place, *program).split()
    assert int(received) == TRANSFER_BYTES
    return float(seconds)


def traces_on_this_machine(directory: Path, prefix: str) -> list[str]:
    """What a cluster that is up has changed outside its state directory."""
    hosts = [line for line in Path("/etc/hosts").read_text().splitlines() if str(directory) in line or prefix in line]
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(directory) in line]
    interfaces = [name for name in os.listdir("/sys/class/net") if prefix in name]  # noqa: PTH208 - names, not paths
    processes = [pid.name for pid in Path("/proc").glob("[0-9]*") if str(directory) in _environment_and_command(pid)]
    return hosts + mounts + interfaces + processes


def _environment_and_command(process: Path) -> str:
    try:
        return ((process / "cmdline").read_bytes() + (process / "environ").read_bytes()).decode(errors="replace")
    except OSError:
        return ""


def test_each_node_has_its_own_host_name(slurm_cluster: SlurmCluster) -> None:
    names = slurm_cluster.run("srun", f"--nodes={NODE_COUNT}", "--ntasks-per-node=1", "hostname").split()

    assert sorted(names) == slurm_cluster.nodes
    assert len(set(names)) == NODE_COUNT


def test_two_gpus_a_node_are_visible_to_tasks(slurm_cluster: SlurmCluster) -> None:
    show = "echo $SLURM_NODEID $CUDA_VISIBLE_DEVICES"
    lines = slurm_cluster.run(
        "srun", f"--nodes={NODE_COUNT}", "--ntasks-per-node=1", f"--gpus-per-node={GPUS_PER_NODE}", "sh", "-c", show
    ).splitlines()

    assert sorted(lines) == [f"{node} 0,1" for node in range(NODE_COUNT)]


def test_accounting_reports_a_finished_job_with_its_gpus(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    options = ("--parsable", "--wait", f"--nodes={NODE_COUNT}", "--gpus-per-node=2", f"--output={tmp_path}/log")
    job = slurm_cluster.run("sbatch", *options, "--wrap=srun true").strip()

    record = slurm_cluster.run("sacct", "-nXP", f"--jobs={job}", "--format=state,nnodes,alloctres")
    state, nodes, resources = record.strip().split("|")
    assert (state, nodes) == ("COMPLETED", "4")
    assert "gres/gpu=8" in resources


def test_accounting_reports_a_failed_job(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    submit = slurm_cluster.run("sbatch", "--parsable", f"--output={tmp_path}/log", "--wrap=exit 7")
    job = submit.strip()
    slurm_cluster.run("srun", f"--dependency=afterany:{job}", "true")

    record = slurm_cluster.run("sacct", "-nXP", f"--jobs={job}", "--format=state,exitcode")
    assert record.strip() == "FAILED|7:0"


def test_up_twice_changes_nothing(slurm_cluster: SlurmCluster) -> None:
    before = slurm_cluster.run("scontrol", "show", "config"), Path("/etc/hosts").read_bytes()
    again = slurm_cluster.command("up")
    after = slurm_cluster.run("scontrol", "show", "config"), Path("/etc/hosts").read_bytes()

    assert again.returncode == 0, again.stderr
    boot_times = [[line for line in text.splitlines() if "BOOT_TIME" in line] for text, _ in (before, after)]
    assert boot_times[0] == boot_times[1] != []
    assert before[1] == after[1]


@pytest.mark.parametrize("throttled", ["sender", "receiver"])
def test_throttling_slows_both_directions_and_restore_undoes_it(slurm_cluster: SlurmCluster, throttled: str) -> None:
    sender, receiver = slurm_cluster.nodes[:2]
    node = {"sender": sender, "receiver": receiver}[throttled]
    least_s = TRANSFER_BYTES * 8 / RATE_BITS
    free_s = transfer_s(slurm_cluster, sender, receiver)
    try:
        slurm_cluster.fault("throttle", node, f"{RATE_BITS // 10**6}mbit")
        assert slurm_cluster.fault("list") == f"{node}: throttled to 10 Mbit/s\n"
        throttled_s = transfer_s(slurm_cluster, sender, receiver)
    finally:
        slurm_cluster.fault("restore", node)

    assert throttled_s > 0.9 * least_s
    assert free_s < least_s / 3
    assert transfer_s(slurm_cluster, sender, receiver) < least_s / 3
    assert slurm_cluster.fault("list") == ""


@pytest.mark.parametrize(("only", "said"), [("send", "sends"), ("receive", "receives")])
def test_one_direction_of_a_link_can_be_throttled_alone(slurm_cluster: SlurmCluster, only: str, said: str) -> None:
    node, other = slurm_cluster.nodes[:2]
    least_s = TRANSFER_BYTES * 8 / RATE_BITS
    try:
        slurm_cluster.fault("throttle", node, f"{RATE_BITS // 10**6}mbit")
        slurm_cluster.fault("throttle", node, f"{RATE_BITS // 10**6}mbit", "--only", only)
        assert slurm_cluster.fault("list") == f"{node}: {said} at most 10 Mbit/s\n"
        sent_s, received_s = transfer_s(slurm_cluster, node, other), transfer_s(slurm_cluster, other, node)
    finally:
        slurm_cluster.fault("restore", node)

    slow_s, free_s = (sent_s, received_s) if only == "send" else (received_s, sent_s)
    assert slow_s > 0.9 * least_s
    assert free_s < least_s / 3
    assert slurm_cluster.fault("list") == ""


def test_a_node_that_was_cut_off_and_one_that_was_stopped_return_to_work(slurm_cluster: SlurmCluster) -> None:
    _, _, cut, stopped = slurm_cluster.nodes
    try:
        slurm_cluster.fault("cut", cut)
        slurm_cluster.fault("stop", stopped)
        assert slurm_cluster.fault("list").splitlines() == [f"{cut}: cut off", f"{stopped}: stopped"]
        assert slurm_cluster.command("status").returncode == 1
    finally:
        slurm_cluster.fault("restore", cut)
        slurm_cluster.fault("restore", stopped)

    assert slurm_cluster.command("status").returncode == 0
    names = slurm_cluster.run("srun", f"--nodes={NODE_COUNT}", "hostname").split()
    assert sorted(names) == slurm_cluster.nodes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("throttle", "nowhere", "30mbit"), "There is no node 'nowhere'"),
        (("throttle", "FIRST", "30"), "The rate '30' must be"),
        (("throttle", "FIRST", "1mbit; reboot"), "must be a number"),
        (("throttle", "FIRST", "30mbit", "--queue-ms", "0"), "longest wait"),
    ],
)
def test_a_wrong_fault_is_refused_in_one_sentence(
    slurm_cluster: SlurmCluster, arguments: tuple[str, ...], complaint: str
) -> None:
    first = slurm_cluster.nodes[0]
    refused = slurm_cluster.command("fault", *(first if word == "FIRST" else word for word in arguments))

    assert refused.returncode == 1
    assert complaint in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_down_cancels_jobs_and_leaves_nothing_behind(spare_cluster: SlurmCluster) -> None:
    hosts_before = Path("/etc/hosts").read_bytes()
    started = spare_cluster.command("up", "--prefix", "spare")
    assert started.returncode == 0, started.stderr
    assert traces_on_this_machine(spare_cluster.directory, "spare")
    log = spare_cluster.directory / "log" / "job.log"
    job = spare_cluster.run(
        "sbatch", "--parsable", f"--nodes={NODE_COUNT}", f"--output={log}", "--wrap=srun sleep 600"
    ).strip()
    spare_cluster.run("sbatch", f"--nodes={NODE_COUNT}", f"--output={log}", "--wrap=srun sleep 600")

    stopped = spare_cluster.command("down")

    assert stopped.returncode == 0, stopped.stderr
    assert traces_on_this_machine(spare_cluster.directory, "spare") == []
    assert Path("/etc/hosts").read_bytes() == hosts_before
    assert spare_cluster.command("status").returncode == 1
    assert spare_cluster.command("down").returncode == 0
    assert spare_cluster.command("up").returncode == 0
    assert spare_cluster.run("squeue", "-h") == ""
    assert spare_cluster.run("sacct", "-nXP", f"--jobs={job}", "--format=state").startswith("CANCELLED")
    assert spare_cluster.command("down", "--purge").returncode == 0
    assert not spare_cluster.directory.exists()


@pytest.mark.long
def test_up_mends_a_cluster_whose_controller_and_network_are_gone(spare_cluster: SlurmCluster) -> None:
    assert spare_cluster.command("up", "--prefix", "spare").returncode == 0
    job = spare_cluster.run("sbatch", "--parsable", "--no-requeue", "--output=/dev/null", "--wrap=sleep 600").strip()
    spare_cluster.run("srun", f"--dependency=after:{job}", "true")
    pid = (spare_cluster.directory / "run" / "slurmctld.pid").read_text().strip()
    spare_cluster.run("kill", pid)  # which, unlike -KILL, has the controller write down first that the job runs
    spare_cluster.run("umount", str(spare_cluster.directory / "netns" / "spare2"))
    assert spare_cluster.command("status").returncode == 1

    mended = spare_cluster.command("up")

    assert mended.returncode == 0, mended.stderr
    names = spare_cluster.run("srun", f"--nodes={NODE_COUNT}", "hostname").split()
    assert sorted(names) == ["spare1", "spare2", "spare3", "spare4"]
    assert job not in spare_cluster.run("squeue", "-h", "-o", "%A").split()
    assert spare_cluster.run("sacct", "-nXP", f"--jobs={job}", "--format=state") == "NODE_FAIL\n"


def test_up_refuses_names_that_mean_another_machine_and_a_folder_that_is_not_its_own(
    slurm_cluster: SlurmCluster, spare_cluster: SlurmCluster
) -> None:
    prefix = slurm_cluster.nodes[0].rstrip("0123456789")
    taken = spare_cluster.command("up", "--prefix", prefix)
    assert taken.returncode == 1
    assert "already resolves" in taken.stderr
    assert spare_cluster.command("down", "--purge").returncode == 0

    spare_cluster.directory.mkdir()
    (spare_cluster.directory / "thesis.tex").touch()
    foreign = spare_cluster.command("up", "--prefix", "spare")
    assert foreign.returncode == 1
    assert "other files" in foreign.stderr
    (spare_cluster.directory / "thesis.tex").unlink()
