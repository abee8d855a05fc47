"""The first rank of each node notes what the node's links carry while it runs."""

import json

import pytest

from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.__main__ import links_recorded
from hpcmm.worker.environment import RankEnvironment


def rank_env(local_rank: int) -> RankEnvironment:
    return RankEnvironment(
        rank=2 + local_rank,
        local_rank=local_rank,
        world_size=4,
        local_world_size=2,
        job_id="1",
        node="node2",
        master_addr="node1",
        master_port=1,
    )


def test_the_first_rank_of_a_node_writes_before_it_starts_and_when_it_has_ended(tmp_path) -> None:
    run = RunDir(tmp_path)
    with links_recorded(run, rank_env(0), nodes=2):
        assert set(json.loads((run.links / "node2.json").read_text())) == {"start"}
    found = json.loads((run.links / "node2.json").read_text())
    assert set(found) == {"start", "end"}
    assert found["start"]["unix_ns"] <= found["end"]["unix_ns"]


def test_a_rank_that_ends_by_an_error_has_its_end_noted_too(tmp_path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(RuntimeError), links_recorded(run, rank_env(0), nodes=2):
        raise RuntimeError
    assert "end" in json.loads((run.links / "node2.json").read_text())


@pytest.mark.parametrize(("local_rank", "nodes"), [(1, 2), (0, 1)])
def test_no_other_rank_writes_and_no_run_on_one_node(tmp_path, local_rank, nodes) -> None:
    with links_recorded(RunDir(tmp_path), rank_env(local_rank), nodes=nodes):
        pass
    assert not list(tmp_path.iterdir())
