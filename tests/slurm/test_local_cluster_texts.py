"""What the one-machine cluster writes into the machine's files, and which input it refuses, without starting it."""

from __future__ import annotations

import fcntl
from ipaddress import IPv4Network
from pathlib import Path

import pytest

LOCAL = Path(__file__).resolve().parents[2] / "slurm" / "local"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LOCAL))


@pytest.mark.parametrize("before", ["", "127.0.0.1 localhost\n", "127.0.0.1 localhost", "\n\n", "a\r\n"])
def test_removing_the_hosts_block_gives_the_file_back_byte_for_byte(before: str) -> None:
    from cluster import host_names
    from cluster.layout import Layout

    layout = Layout(Path("/state/a+b"), "node", IPv4Network("10.77.3.0/24"))
    other = Layout(Path("/state/a"), "spare", IPv4Network("10.77.4.0/24"))
    written = before + host_names.block(layout, before)
    both = written + host_names.block(other, written)

    assert "10.77.3.14 node4\n" in written
    assert host_names.without_block(layout.root, written) == before
    assert host_names.without_block(layout.root, host_names.without_block(other.root, both)) == before
    assert "10.77.4.11 spare1\n" in host_names.without_block(layout.root, both)


def test_names_of_a_cluster_that_the_machine_stopped_with_are_freed_and_those_of_one_in_use_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import host_names, lifecycle, state_directory
    from cluster.layout import Layout

    monkeypatch.setattr(host_names, "HOSTS_FILE", tmp_path / "hosts")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    own, gone, stopped, busy, up = (
        Layout(tmp_path / name, name, IPv4Network("10.77.3.0/24")) for name in ("own", "gone", "stopped", "busy", "up")
    )
    for layout in (own, stopped, busy, up):
        layout.namespaces.mkdir(parents=True)
        (layout.root / state_directory.LOCK).touch()
        state_directory.record(layout)
        for host in layout.hosts:
            host.namespace.touch()
    up.nodes[1].namespace.unlink()
    up.nodes[1].namespace.symlink_to("/proc/self/ns/net")  # on another device than its folder, as a mounted one is
    for layout in (own, gone, stopped, busy, up):
        text = (tmp_path / "hosts").read_text()
        (tmp_path / "hosts").write_text(text + host_names.block(layout, text))

    with state_directory.locked(busy.root):
        lifecycle._forget_abandoned_names(own.root)

    assert host_names.owners() == [own.root, busy.root, up.root]
    assert "stopped1" not in (tmp_path / "hosts").read_text()


@pytest.mark.parametrize(("rate", "bits"), [("30mbit", 30_000_000), ("1.5gbit", 1_500_000_000), ("8kbit", 8_000)])
def test_rates_are_read_in_bits_per_second(rate: str, bits: int) -> None:
    from cluster.faults import rate_in_bits

    assert rate_in_bits(rate) == bits


@pytest.mark.parametrize("rate", ["30", "mbit", "-1mbit", "0mbit", "1 mbit", "1mbit;", "30MB", "9e9gbit"])
def test_anything_else_is_no_rate(rate: str) -> None:
    from cluster.errors import ClusterError
    from cluster.faults import rate_in_bits

    with pytest.raises(ClusterError, match="such as 30mbit"):
        rate_in_bits(rate)


@pytest.mark.parametrize("path", ["relative", "/with blank", "/quo'te", "/a/../b", "/" + "long" * 20])
def test_a_state_directory_that_slurm_could_not_use_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import state_directory
    from cluster.errors import ClusterError

    monkeypatch.setenv(state_directory.VARIABLE, path)
    with pytest.raises(ClusterError, match="absolute path"):
        state_directory.chosen()


@pytest.mark.parametrize(
    ("taken", "given", "chosen"),
    [
        ({"node1"}, None, "nodeb"),
        ({"node4", "nodeb2"}, None, "nodec"),
        (set(), None, "node"),
        ({"node1"}, "node", "node"),
    ],
)
def test_a_cluster_takes_names_that_nobody_has_unless_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: set[str], given: str | None, chosen: str
) -> None:
    from cluster import host_names, lifecycle, network

    monkeypatch.setattr(network, "free_subnet", lambda: IPv4Network("10.77.3.0/24"))
    monkeypatch.setattr(host_names, "_names_that_resolve", lambda names: [name for name in names if name in taken])
    assert lifecycle._layout_to_start(tmp_path, given).prefix == chosen


def test_of_clusters_that_start_at_once_one_chooses_its_subnet_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import network

    monkeypatch.setattr(network, "LOCK", tmp_path / "lock")
    with network.machine_locked(), (tmp_path / "lock").open() as another, pytest.raises(BlockingIOError):
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "lock").open() as another:
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"), network.machine_locked():
        pass


def test_lines_of_one_s_own_come_last_in_slurm_conf(tmp_path: Path) -> None:
    from cluster import slurm_config
    from cluster.layout import Layout

    layout = Layout(tmp_path, "node", IPv4Network("10.77.3.0/24"))
    layout.etc.mkdir()
    (layout.etc / slurm_config.EXTRA).write_text("KillWait=5\n")
    slurm_config.write(layout)
    assert layout.slurm_conf.read_text().endswith("State=UP\nKillWait=5\n")
