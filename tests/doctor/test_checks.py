"""From nodes' facts to findings."""

import copy

import pytest

from hpcmm.doctor.checks import Weight, bad_nodes, bandwidths, check_findings
from hpcmm.doctor.node import parse_gpus
from hpcmm.doctor.preflight import chosen_nodes
from hpcmm.errors import HpcmmError

NODES = ["a", "b", "c", "d"]
GPU = "0, A30, GPU-1, 40, 0, Not Active, 16, 16"


def facts(node):
    return {
        "node": node,
        "python": {"version": "3.11.2", "prefix": "/env", "machine": "x86_64"},
        "packages": {"torch": "2.13.0", "numpy": "2.1.0", "nvtx": "0.2.11"},
        "names": {each: f"10.0.0.{number}" for number, each in enumerate(NODES)},
        "interfaces": {"ib0": {"addresses": ["10.0.0.1"], "mbit_per_s": 100_000, "mtu": 1500, "errors": 0}},
        "interface": "ib0",
        "infiniband": {},
        "gpus": {"gpus": parse_gpus(GPU), "problem": None},
        "nsys": "/usr/bin/nsys",
        "nsys_problem": None,
        "disks": {"/runs": {"free_bytes": 10**12, "total_bytes": 10**13, "free_inodes": 10**6, "writable": True}},
        "clock": {"offset_s": 0.0, "error_s": 0.001},
        "shared": {"/runs": []},
        "all_reduce": {"backend": "nccl", "pairs": [[node, other, 1e10] for other in NODES if other != node]},
    }


@pytest.fixture
def found():
    return {node: facts(node) for node in NODES}


def findings_of(found, **options):
    return [(each.node, each.check, each.weight) for each in check_findings(NODES, found, **options)]


def test_equal_nodes_are_good(found):
    assert findings_of(found, gpus_per_node=1) == []


def slow(found):
    for node in NODES:
        found[node]["all_reduce"]["pairs"] = [
            [first, second, 1e9 if "b" in (first, second) else rate]
            for first, second, rate in found[node]["all_reduce"]["pairs"]
        ]


def unseen(found):
    for node in NODES:
        found[node]["shared"]["/runs"] = [each for each in NODES if each != "b"] if node == "b" else ["b"]


@pytest.mark.parametrize(
    ("check", "breaks"),
    [
        ("Python", lambda found: found["b"]["python"].update(version="3.12.0")),
        ("packages", lambda found: found["b"]["packages"].pop("numpy")),
        ("name resolution", lambda found: found["b"]["names"].update(c=None)),
        ("network", lambda found: found["b"].update(problem="it did not come")),
        ("shared file system", unseen),
        ("shared file system", lambda found: found["b"].update(unwritable={"/runs": "Read-only file system"})),
        ("network interface", lambda found: found["b"]["interfaces"]["ib0"].update(mbit_per_s=1000)),
        ("all-reduce", slow),
        ("all-reduce", lambda found: found["b"].update(all_reduce={"problem": "timeout"})),
        ("disk", lambda found: found["b"]["disks"]["/runs"].update(free_bytes=10**6)),
        ("disk", lambda found: found["b"]["disks"]["/runs"].update(free_inodes=3)),
        ("nsys", lambda found: found["b"].update(nsys_problem="nsys left no report")),
        ("GPU", lambda found: found["b"]["gpus"].update(gpus=[])),
        ("GPU", lambda found: found["b"]["gpus"].update(gpus=parse_gpus(GPU.replace(" 0,", " 7,")))),
        ("GPU", lambda found: found["b"]["gpus"].update(gpus=parse_gpus(GPU.replace("Not Active", "Active")))),
        ("answer", lambda found: found.pop("b")),
    ],
)
def test_the_node_that_differs_is_the_bad_one(found, check, breaks):
    breaks(found)
    assert findings_of(found, gpus_per_node=1) == [("b", check, Weight.bad)]


def test_a_clock_that_is_off_beyond_its_error_is_a_warning(found):
    off = copy.deepcopy(found)
    off["c"]["clock"] = {"offset_s": 0.5, "error_s": 0.01}
    assert findings_of(off) == [("c", "clock", Weight.warning)]
    off["c"]["clock"]["error_s"] = 0.45
    assert findings_of(off) == []


def test_of_two_different_nodes_both_are_told(found):
    del found["c"], found["d"]
    found["b"]["python"]["version"] = "3.12.0"
    assert [(each.node, each.check) for each in check_findings(["a", "b"], found)] == [("a", "Python"), ("b", "Python")]


def test_a_node_s_bandwidth_is_that_of_its_best_pair(found):
    slow(found)
    assert bandwidths(found) == {"a": 1e10, "b": 1e9, "c": 1e10, "d": 1e10}


def test_spare_nodes_replace_bad_ones(found):
    slow(found)
    bad = bad_nodes(check_findings(NODES, found), NODES)
    assert chosen_nodes(NODES, bad, 3) == ["a", "c", "d"]
    assert chosen_nodes(NODES, bad, 2) == ["a", "c"]
    with pytest.raises(HpcmmError, match=r"b failed .* 3 of 4 nodes.*cluster\.exclude=\"b\".*spare_nodes=1"):
        chosen_nodes(NODES, bad, 4)


def test_a_python_without_torch_leaves_the_links_unmeasured_and_no_node_is_bad_for_it(found):
    for facts in found.values():
        facts["all_reduce"] = {"not_measured": "its Python has no torch"}
    (finding,) = check_findings(NODES, found)
    assert (finding.weight, finding.said) == (Weight.note, "no link of 4 nodes is measured: its Python has no torch")


def test_a_python_without_nvtx_is_a_warning(found):
    for facts in found.values():
        del facts["packages"]["nvtx"]
    assert findings_of(found) == [(node, "nsys", Weight.warning) for node in NODES]
