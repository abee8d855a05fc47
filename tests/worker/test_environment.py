"""Who a rank is, from the scheduler's environment."""

import socket

import pytest

from hpcmm.config.sweep import compose_points
from hpcmm.errors import HpcmmError
from hpcmm.node.network import find_free_port
from hpcmm.worker.environment import RankEnvironment, forget_outer_run, tell_launchers, threads_per_rank

SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "42", "SLURMD_NODENAME": "node3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_NODEID": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "23456",
}  # fmt: skip


def test_slurm_tells_a_rank_its_place():
    place = RankEnvironment.read(SLURM)
    assert (place.rank, place.local_rank, place.world_size, place.node, place.job_id) == (5, 1, 8, "node3", "42")
    exported: dict[str, str] = {}
    place.export(exported)
    assert exported == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node1", "MASTER_PORT": "23456",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "expected"), [("2(x4)", "3", 2), ("3,1(x2)", "0", 3), ("3,1(x2)", "2", 1), ("8", "0", 8)]
)
def test_ranks_on_this_node_come_from_slurm_s_list(tasks_per_node, node, expected):
    place = RankEnvironment.read(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": node})
    assert place.local_world_size == expected


def test_the_local_executor_is_believed_within_a_slurm_job():
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "2", "SUBMITIT_LOCAL_LOCALID": "2",
             "SUBMITIT_LOCAL_NTASKS": "4", "SUBMITIT_LOCAL_JOB_ID": "99"}  # fmt: skip
    place = RankEnvironment.read(SLURM | local)
    assert (place.rank, place.world_size, place.job_id) == (2, 4, "99")


def test_what_is_missing_is_named():
    with pytest.raises(HpcmmError, match=r"SLURM_PROCID, MASTER_PORT not set"):
        RankEnvironment.read({k: v for k, v in SLURM.items() if k not in ("SLURM_PROCID", "MASTER_PORT")})


def test_only_a_run_with_a_script_keeps_the_script_s_marks_and_the_user_s_settings_stay():
    script = {"HPCMM_SCRIPT_BEGAN_S": "1", "HPCMM_SRUN_BEGAN_S": "2"}
    users = {"HPCMM_CLUSTER_DIR": "/mine", "HPCMM_OF_MY_OWN": "x"}
    outer = {"HPCMM_RUN_DIR": "/r", "HPCMM_STAGED": "{}", "HPCMM_STAGE_DIR": "/s", "HPCMM_COMMAND_BEGAN_S": "3"}
    for has_script, kept in ((True, script | users), (False, users)):
        environ = script | users | outer
        forget_outer_run(environ, has_script=has_script)
        assert environ == kept


def test_a_free_port_can_be_bound_and_one_that_is_taken_is_not_given(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", find_free_port("127.0.0.1")))
        listener.listen()
        taken = listener.getsockname()[1]
        monkeypatch.setattr("random.sample", lambda *_: [taken, taken + 1, taken + 2])
        assert find_free_port("127.0.0.1") in (taken + 1, taken + 2)


def told(*overrides: str, **given: str) -> dict[str, str]:
    """What the one rank of the second of two nodes finds in its environment, beside MASTER_ADDR and its port."""
    environ = {"SLURM_NODEID": "1", **given}
    rank_env = RankEnvironment(1, 0, 2, 1, "17", "node2", "node1", 2345)
    rank_env.export(environ)
    (point,) = compose_points(["cluster=slurm", "cluster.nodes=2", *overrides])
    tell_launchers(point.config, rank_env, environ)
    return {name: value for name, value in environ.items() if not name.startswith(("MASTER_", "SLURM_"))}


PLACES = {
    "HPCMM_NODES": "2", "HPCMM_NODE_RANK": "1", "NODE_RANK": "1", "PET_NNODES": "2", "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "node1", "PET_MASTER_PORT": "2345", "PET_RDZV_ENDPOINT": "node1:2345", "PET_RDZV_ID": "17",
}  # fmt: skip
OWN = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}


def test_one_process_a_node_is_told_where_all_nodes_meet_and_no_rank_if_its_workers_would_inherit_it():
    assert told("--", "train.py") == PLACES | OWN
    assert told("--", "torchrun", "train.py") == PLACES
    gpus = "cluster.gpus_per_node=4"
    assert told(gpus, "--", "train.py") == PLACES | {"PET_NPROC_PER_NODE": "4"}
    assert told(gpus, "--", "torchrun", "a.py", PET_NPROC_PER_NODE="2") == PLACES | {"PET_NPROC_PER_NODE": "2"}


def test_a_rank_of_several_on_its_node_is_told_its_node_alone():
    assert told("cluster.ranks_per_node=2", "--", "train.py") == OWN | {"HPCMM_NODES": "2", "HPCMM_NODE_RANK": "1"}


def test_the_workers_of_a_node_share_the_cores_of_the_process_that_starts_them():
    def threads(*overrides: str) -> int:
        return threads_per_rank(compose_points(["cluster=slurm", "cluster.cpus_per_rank=8", *overrides])[0].config)

    assert threads("cluster.gpus_per_node=4", "--", "train.py") == 2
    assert threads("cluster.gpus_per_node=16", "--", "train.py") == 1
    assert threads("cluster.gpus_per_node=4", "cluster.ranks_per_node=4", "--", "train.py") == 8
    assert threads("cluster.gpus_per_node=4", "parallel.threads_per_rank=3", "--", "train.py") == 3
