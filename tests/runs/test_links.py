"""What a run directory says of its nodes' links, whatever somebody wrote there."""

import json

import pytest

from hpcmm.node.links import links, sample
from hpcmm.runs.links import LinkUse, Network, read_network, write_links
from hpcmm.runs.run_dir import RunDir


def eth(**counts):
    usual = {"mbit_per_s": 10_000, "rx_bytes": 0, "tx_bytes": 0, "queue": "mq", "held_back": 0}
    return {"unix_ns": 1, "links": {"eth0": usual | counts, "eth1": {"rx_bytes": 5}}}


def test_the_link_that_carried_most_is_told_by_the_difference_of_its_counters(tmp_path) -> None:
    run = RunDir(tmp_path)
    write_links(run, "node1", eth(rx_bytes=100, rx_dropped=3), eth(rx_bytes=500, tx_bytes=700, rx_dropped=5))
    assert read_network(run) == Network({"node1": LinkUse("eth0", 10_000, 1100, 2, 0, "mq")}, {})


def test_a_node_whose_rank_was_killed_tells_the_rate_alone(tmp_path) -> None:
    run = RunDir(tmp_path)
    write_links(run, "node1", eth(rx_bytes=100))
    assert read_network(run).links["node1"] == LinkUse("eth0", 10_000, 0, 0, 0, "mq")


def test_counters_that_began_anew_count_nothing(tmp_path) -> None:
    run = RunDir(tmp_path)
    write_links(run, "node1", eth(rx_bytes=100), eth(rx_bytes=50, held_back=7))
    use = read_network(run).links["node1"]
    assert (use.bytes, use.held_back) == (0, 7)


@pytest.mark.parametrize("node", ["../elsewhere", "", ".hidden", "a/b", "x" * 300])
def test_a_node_whose_name_is_no_files_is_left_out(tmp_path, node) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    write_links(run, node, eth())
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"start": 3}',
        '{"start": {"links": []}}',
        '{"start": {"links": {"eth0": 1}}}',
        "\0",
        '{"start": {"links',
    ],
)
def test_damage_leaves_the_node_out(tmp_path, text) -> None:
    run = RunDir(tmp_path)
    run.links.mkdir()
    (run.links / "node1.json").write_text(text)
    (run.links / "other.txt").write_text(json.dumps({"start": eth()}))
    assert read_network(run) == Network()


@pytest.mark.parametrize("value", [-1, 1e300, "9", None, True, 1 << 70])
def test_odd_numbers_count_as_nothing(tmp_path, value) -> None:
    run = RunDir(tmp_path)
    write_links(run, "node1", eth(), eth(rx_bytes=value, mbit_per_s=value))
    assert read_network(run).links["node1"].bytes == 0


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(tmp_path, capsys) -> None:
    run = RunDir(tmp_path)
    run.links.write_text("a file")
    write_links(run, "node1", eth())
    assert "is not recorded" in capsys.readouterr().out


def test_what_the_check_before_the_run_measured_is_read(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.preflight.write_text(json.dumps({"all_reduce_bytes_per_s": {"node1": 1e9, "node2": -1, "node3": "x"}}))
    assert read_network(run).measured_bytes_per_s == {"node1": 1e9}


def test_this_nodes_links_are_told_without_the_loopback() -> None:
    found = links()
    assert "lo" not in found
    for facts in found.values():
        assert all(isinstance(facts[name], int) and facts[name] >= 0 for name in ("mbit_per_s", "rx_bytes", "tx_bytes"))
    assert set(sample()) == {"unix_ns", "links"}
