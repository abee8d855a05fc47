"""What is proposed for clusters of many kinds, from what their Slurm prints, of versions 20.11 to 24.05."""

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from hpcmm.errors import HpcmmError
from hpcmm.init.proposal import Line, Wanted, choose_partition, propose, written
from hpcmm.init.site import (
    Accounting,
    Association,
    Site,
    is_usable,
    parse_associations,
    parse_gpus,
    parse_minutes,
    parse_nodes,
    parse_partitions,
    parse_qos,
    parse_sinfo,
)

NODE = {
    "20.11": (
        "NodeName={name} Arch=x86_64 CoresPerSocket=16  CPUAlloc=0 CPUTot=64 CPULoad=0.01 AvailableFeatures=ib,skylake "
        "ActiveFeatures=ib,skylake Gres={gres} NodeAddr={name} NodeHostName={name} Version=20.11.9 "
        "OS=Linux 3.10.0-1160.el7.x86_64 #1 SMP Mon Oct 19 16:18:59 UTC 2020  RealMemory=515000 AllocMem=0 "
        "FreeMem=500000 Sockets=2 Boards=1 State={state} ThreadsPerCore=2 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A "
        "Partitions={partitions}  BootTime=2021-01-01T00:00:00 CfgTRES=cpu=64,mem=515000M,billing=64 AllocTRES= "
        "CapWatts=n/a Comment=(null)"
    ),
    "24.05": (
        "NodeName={name} Arch=x86_64 CoresPerSocket=32  CPUAlloc=0 CPUEfctv=62 CPUTot=64 CPULoad=0.00 "
        "AvailableFeatures=location=local,H100 ActiveFeatures=location=local,H100 Gres={gres} NodeAddr={name} "
        "NodeHostName={name} Version=24.05.3 OS=Linux 6.2.0-37-generic #38~22.04.1-Ubuntu SMP PREEMPT_DYNAMIC "
        "RealMemory=1031000 AllocMem=0 FreeMem=900000 Sockets=2 Boards=1 CoreSpecCount=2 CPUSpecList=31,63 "
        "MemSpecLimit=16384 State={state} ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A "
        "Partitions={partitions}  BootTime=None SlurmdStartTime=None LastBusyTime=2024-06-01T00:00:00 "
        "ResumeAfterTime=None CfgTRES=cpu=62,mem=1031000M,billing=62 AllocTRES= CurrentWatts=0 AveWatts=0 "
        "Reason=Gres=gpu:evil:9 State=IDLE Partitions=root [root@2024-06-01T00:00:00]"
    ),
}
PARTITION = (
    "PartitionName={name} AllowGroups={groups} AllowAccounts={accounts} AllowQos={qos} AllocNodes=ALL "
    "Default={default} QoS={own_qos} DefaultTime={usual} DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO "
    "MaxNodes={nodes} "
    "MaxTime={most} MinNodes=0 LLN=NO MaxCPUsPerNode={cpus} MaxCPUsPerSocket=UNLIMITED Nodes=n[001-010] "
    "PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF "
    "State={state} TotalCPUs=640 TotalNodes=10 SelectTypeParameters=NONE JobDefaults={jobs} DefMemPerCPU=2000 "
    "{memory} TRES=cpu=640,mem=5150000M,node=10,billing=640"
)
USUAL = {
    "groups": "ALL", "accounts": "ALL", "qos": "ALL", "default": "NO", "own_qos": "N/A", "usual": "NONE",
    "nodes": "UNLIMITED", "most": "UNLIMITED", "cpus": "UNLIMITED", "state": "UP", "jobs": "(null)",
    "memory": "MaxMemPerNode=UNLIMITED",
}  # fmt: skip


def node(name: str, gres: str, partitions: str = "gpu", state: str = "IDLE", version: str = "20.11") -> str:
    return NODE[version].format(name=name, gres=gres, partitions=partitions, state=state)


def partition(name: str = "gpu", **facts: str) -> str:
    return PARTITION.format(name=name, **(USUAL | facts))


def site(nodes: list[str], *partitions: str, **facts: Any) -> Site:
    listed = parse_partitions("\n".join(partitions or [partition(default="YES")]))
    return Site("lab", "20.11.9", partitions=tuple(listed), nodes=tuple(parse_nodes("\n".join(nodes))), **facts)


def values(of: Site, **wanted: Any) -> dict[str, Any]:
    """What the file says, read as YAML."""
    return yaml.safe_load(text(of, **wanted))


def text(of: Site, **wanted: Any) -> str:
    return written(propose(of, Wanted("lab", **wanted)), "By a test.", None)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:2", {"": 2}),
        ("gpu:8(S:0,3)", {"": 8}),
        ("gpu", {"": 1}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:1g.5gb:7", {"1g.5gb": 7}),
        ("gpu:a100:2(S:0),gpu:a100_1g.5gb:14(S:1)", {"a100": 2, "a100_1g.5gb": 14}),
        ("gpu:v100:2,gpu:nvidia_a100-sxm4-40gb:4", {"nvidia_a100-sxm4-40gb": 4, "v100": 2}),
        ("gres:gpu:h100:8(S:0-1)", {"h100": 8}),
        ("craynetwork:4,gpu:no_consume:4,nvme:1600G,shard:32,mps:400", {"": 4}),
        ("gpu:$(reboot):4", {}),
        ("(null)", {}),
        ("", {}),
        ("gpu:99999", {}),
    ],
)
def test_gpus_are_known_by_type_whatever_else_a_node_has(gres, gpus):
    assert dict(parse_gpus(gres)) == gpus
    assert next(iter(gpus), None) == next((each for each, _ in parse_gpus(gres)), None)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("1-00:00:00", 1440), ("12:00:00", 720), ("00:20:00", 20), ("30:00", 30), ("00:31", 1), ("60", 60),
        ("7-00", 10080), ("2-12:30", 3630), ("UNLIMITED", None), ("infinite", None), ("NONE", None), ("n/a", None),
        ("", None), ("1:2:3:4:5", None), ("-5", None), ("9" * 500, None),
    ],
)  # fmt: skip
def test_times_of_slurm_are_minutes(time, minutes):
    assert parse_minutes(time) == minutes


@pytest.mark.parametrize(
    "state", ["IDLE", "MIXED", "ALLOCATED", "IDLE+CLOUD+POWERED_DOWN", "idle~", "RESERVED+PLANNED"]
)
def test_a_node_in_use_or_asleep_takes_jobs(state):
    assert is_usable(state)


@pytest.mark.parametrize("state", ["DOWN", "IDLE+DRAIN", "drained*", "DOWN*+DRAIN", "IDLE*", "FUTURE", "failing", ""])
def test_a_node_that_is_down_or_drained_takes_none(state):
    assert not is_usable(state)


def test_a_whole_node_is_proposed_with_a_rank_for_each_gpu():
    said = values(site([node(f"n{each}", "gpu:a100:4(S:0-1)") for each in range(3)], shares_memory=True))
    assert said == {
        "name": "lab", "executor": "slurm", "partition": "gpu", "nodes": 2, "ranks_per_node": 4, "gpus_per_node": 4,
        "cpus_per_rank": 16, "memory_gb": 502, "time_limit_min": 240,
    }  # fmt: skip


def test_what_the_node_keeps_for_itself_is_not_asked_for():
    said = values(site([node("n1", "gpu:h100:2", version="24.05")], shares_memory=True))
    assert (said["cpus_per_rank"], said["memory_gb"]) == (31, 990)


def test_a_reason_that_an_operator_wrote_is_not_taken_for_facts():
    (found,) = parse_nodes(node("n1", "gpu:h100:2", state="IDLE+DRAIN", version="24.05"))
    assert (found.gpus, found.partitions, found.is_usable) == ((("h100", 2),), ("gpu",), False)


def test_of_several_types_the_most_numerous_nodes_with_gpus_are_taken_and_named():
    nodes = [node(f"a{each}", "gpu:a100:4") for each in range(5)] + [
        node(f"h{each}", "gpu:h100:8") for each in range(2)
    ]
    nodes += [node(f"c{each}", "(null)") for each in range(20)]
    said = values(site(nodes))
    assert (said["gpu_type"], said["gpus_per_node"]) == ("a100", 4)
    other = values(site(nodes), gpu_type="h100")
    assert (other["gpu_type"], other["gpus_per_node"], other["cpus_per_rank"]) == ("h100", 8, 8)
    comments = " ".join(text(site(nodes)).split("\n# "))
    assert "5 nodes with 4 a100 GPUs, 64 CPUs and 502 GB" in re.sub(r"\s+", " ", comments)
    with pytest.raises(HpcmmError, match=r"GPUs of type v100: choose one of a100, h100\."):
        values(site(nodes), gpu_type="v100")


def test_of_one_type_no_type_is_asked_for():
    assert "gpu_type" not in values(site([node("n1", "gpu:a100:4")]))


def test_nodes_that_are_drained_do_not_decide():
    nodes = [node(f"a{each}", "gpu:a100:4", state="IDLE+DRAIN") for each in range(5)]
    nodes += [node("v1", "gpu:v100:2"), node("v2", "gpu:v100:2")]
    said = values(site(nodes))
    assert (said["gpu_type"], said["nodes"]) == ("v100", 2)
    assert "5 of them down or drained" in text(site(nodes))


def test_whole_gpus_come_before_slices_of_them():
    both = values(site([node("n1", "gpu:1g.5gb:14,gpu:a100:2")]))
    assert (both["gpu_type"], both["gpus_per_node"], both["ranks_per_node"]) == ("a100", 2, 2)
    slices = site([node("n1", "gpu:1g.5gb:7")], shares_memory=True)
    assert values(slices)["gpus_per_node"] == 1
    assert values(slices)["cpus_per_rank"] == 9
    assert values(slices)["memory_gb"] == 71
    assert "NCCL does not work between slices" in text(slices)


def test_a_partition_without_gpus_gets_a_rank_for_each_processor():
    said = values(site([node("n1", "(null)", "cpu")], partition("cpu", default="YES")))
    assert (said["gpus_per_node"], said["ranks_per_node"], said["cpus_per_rank"]) == (0, 2, 32)


def test_gpus_are_asked_for_by_gres_where_slurm_takes_nothing_else():
    said = values(site([node("n1", "gpu:2")], takes_gpus_per_node=False))
    assert said["gpu_option"] == "gres"


def test_the_default_partition_is_taken_unless_only_others_have_gpus():
    nodes = [node("c1", "(null)", "cpu,all"), node("g1", "gpu:4", "gpu,all"), node("g2", "gpu:8", "big")]
    of_cpus = site(nodes, partition("cpu", default="YES"), partition("gpu"), partition("big"))
    assert choose_partition(of_cpus, None)[0].name == "big"
    of_all = site(nodes, partition("cpu"), partition("all", default="YES"), partition("big"))
    chosen, why = choose_partition(of_all, None)
    assert chosen.name == "all"
    assert "cpu: 1 node, no GPU; all (default): 2 nodes, 4 GPUs; big: 1 node, 8 GPUs" in why
    with pytest.raises(HpcmmError, match="gpus is not a partition here: choose one of cpu, gpu, big"):
        values(of_cpus, partition="gpus")


def test_a_partition_that_takes_no_job_of_the_user_is_passed_over_and_named():
    nodes = [node("g1", "gpu:8", "down,theirs,group,ours,empty"), node("g2", "gpu:8", "drained", "DOWN*")]
    partitions = [
        partition("down", state="DOWN", default="YES"), partition("theirs", accounts="physics"), partition("empty_one"),
        partition("group", groups="staff"), partition("drained"), partition("ours", accounts="chemistry,biology"),
    ]  # fmt: skip
    own = Accounting(associations=(Association("biology"),), default_account="biology")
    chosen, why = choose_partition(site(nodes, *partitions, accounting=own, groups=frozenset({"users"})), None)
    assert chosen.name == "ours"
    assert "down (default): 1 node, 8 GPUs [it is closed]" in why
    reasons = ("takes none of your accounts", "is not for your groups", "has no nodes")
    assert all(f"[it {reason}]" in why for reason in reasons)
    assert "[no node of it takes jobs at present]" in why


def test_a_hidden_partition_is_taken_only_if_it_is_named():
    nodes = [node("g1", "gpu:8", "secret"), node("g2", "gpu:2", "open")]
    found = site(nodes, partition("secret", default="YES").replace("Hidden=NO", "Hidden=YES"), partition("open"))
    chosen, why = choose_partition(found, None)
    assert (chosen.name, "secret (default): 1 node, 8 GPUs [it is hidden]" in why) == ("open", True)
    assert choose_partition(found, "secret")[0].name == "secret"


ENFORCED = Accounting(
    frozenset({"associations", "limits", "qos"}),
    tuple(
        parse_associations(
            "chem||normal,long|normal|\nbio||gpu,normal|gpu|\nart|debug|normal||\nchem||normal,long|normal|\n"
        )
    ),
    default_account="bio",
)


def test_an_account_is_named_if_slurm_requires_one():
    nodes = [node("n1", "gpu:4")]
    assert values(site(nodes, accounting=ENFORCED))["account"] == "bio"
    assert "your default. Yours: chem, bio." in text(site(nodes, accounting=ENFORCED))
    assert "account" not in values(site(nodes, accounting=replace(ENFORCED, enforced=frozenset())))
    assert values(site(nodes, accounting=ENFORCED), account="chem")["account"] == "chem"
    with pytest.raises(HpcmmError, match="law is not an account of yours there: choose one of chem, bio"):
        values(site(nodes, accounting=ENFORCED), account="law")
    only_chem = site(nodes, partition(accounts="chem,law"), accounting=ENFORCED)
    assert values(only_chem)["account"] == "chem"


def test_an_account_that_slurm_does_not_tell_is_asked_for_in_the_file():
    unknown = Accounting(frozenset({"associations"}), problem="sacctmgr failed (access denied)")
    said = text(site([node("n1", "gpu:4")], accounting=unknown))
    assert "account" not in yaml.safe_load(said)
    assert "Slurm requires one here. Yours are not known (sacctmgr failed (access denied)). Ask the site" in " ".join(
        said.split("\n# ")
    )


def test_a_qos_is_named_if_the_partition_takes_not_the_usual_one():
    nodes = [node("n1", "gpu:4")]
    assert "qos" not in values(site(nodes, partition(qos="gpu,big"), accounting=ENFORCED))
    assert values(site(nodes, partition(qos="long,big"), accounting=ENFORCED), account="chem")["qos"] == "long"
    assert "yours: gpu, normal" in text(site(nodes, partition(qos="big"), accounting=ENFORCED))
    assert values(site(nodes, partition(qos="big,huge")))["qos"] == "big"


@pytest.mark.parametrize(
    ("facts", "minutes"),
    [
        ({"usual": "00:31:00", "most": "04:00:00"}, 31), ({"most": "3-00:00:00"}, 240), ({"most": "00:20:00"}, 20),
        ({"usual": "UNLIMITED", "most": "UNLIMITED"}, 240), ({"usual": "1-00:00:00", "most": "12:00:00"}, 720),
        ({"own_qos": "dev", "usual": "04:00:00"}, 25),
    ],
)  # fmt: skip
def test_the_time_limit_is_the_partitions_usual_one_within_all_limits(facts, minutes):
    known = Accounting(max_time_min_of_qos=parse_qos("dev|00:25:00\nlong|14-00:00:00\nfree|\n"))
    assert values(site([node("n1", "gpu:4")], partition(**facts), accounting=known))["time_limit_min"] == minutes


def test_a_time_limit_of_the_users_account_counts_too():
    known = Accounting(associations=tuple(parse_associations("chem||normal|normal|00:20:00\n")), default_account="chem")
    assert values(site([node("n1", "gpu:4")], accounting=known))["time_limit_min"] == 20
    with pytest.raises(HpcmmError, match=r"limit of 30 min is too long\. Most: 20 by account chem"):
        values(site([node("n1", "gpu:4")], accounting=known), time_limit_min=30)


def test_what_the_partition_gives_a_node_or_a_gpu_bounds_the_request():
    nodes = [node("n1", "gpu:4")]
    assert values(site(nodes, partition(cpus="32")))["cpus_per_rank"] == 8
    assert values(site(nodes, partition(jobs="DefCpuPerGPU=12,DefMemPerGPU=94000")))["cpus_per_rank"] == 12
    assert values(site(nodes, partition(memory="MaxMemPerCPU=4000"), shares_memory=True))["memory_gb"] == 250
    assert values(site(nodes, partition(memory="MaxMemPerNode=100000"), shares_memory=True))["memory_gb"] == 97
    assert values(site([*nodes, node("n2", "gpu:4")], partition(nodes="1")))["nodes"] == 1


def test_memory_that_slurm_does_not_hand_out_is_not_asked_for():
    assert "memory_gb" not in values(site([node("n1", "gpu:4")], shares_memory=False))


def test_sinfo_tells_the_same_if_scontrol_refuses():
    row = ["n1", "gpu*", "gpu:a100:4(S:0-1)", "64", "2", "16", "515000", "idle", "up", "1-00:00:00", "1:00:00"]
    other = ["n1", "short", *row[2:]]
    down = ["n2", "gpu*", *row[2:7], "drained*", "up", "infinite", "n/a"]
    listed = "".join(f"|{'|'.join(each)}|\n" for each in (row, other, down))
    nodes, partitions = parse_sinfo(listed, "|")
    assert [(each.name, each.partitions, each.is_usable) for each in nodes] == [
        ("n1", ("gpu", "short"), True), ("n2", ("gpu",), False),
    ]  # fmt: skip
    assert nodes[0].gpus == (("a100", 4),)
    assert [(each.name, each.is_default) for each in partitions] == [("gpu", True), ("short", False)]
    assert parse_sinfo("CLUSTER: lab\n", "|") == ([], [])


def test_names_that_are_none_are_left_out():
    found = site([node("n1;reboot", "gpu:4"), node("n2", "gpu:4", "gpu,${oc.env:HOME},$(x)")], partition("$(reboot)"))
    assert [each.name for each in found.nodes] == ["n2"]
    assert found.nodes[0].partitions == ("gpu",)
    assert found.partitions == ()


@pytest.mark.parametrize("value", ["yes", "0123", "1e3", "a b", "it's", 'a"b', "x: y", "# c", "null", "ü", "a\nb", "-"])
def test_a_text_in_the_file_is_read_as_it_was(value):
    assert yaml.safe_load(written([Line("partition", value)], "By a test.", None)) == {"partition": value}


def test_no_reason_ends_its_comment():
    said = written([Line("name", "lab", "one\ntwo: \x1b[31m" + "long " * 60)], "head\nline", None)
    assert yaml.safe_load(said) == {"name": "lab"}
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 120
