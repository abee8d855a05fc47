import pytest

from hpcmm.reports.events import read_report
from hpcmm.reports.identity import identity_of, parse_environment


@pytest.mark.parametrize("separator", ["\0", ";"])
def test_only_allow_listed_variables_are_read(separator: str) -> None:
    text = separator.join(
        ["API_TOKEN=hunter2", "SLURM_PROCID=3", "SLURM_JWT=eyJ", "SLURMD_NODENAME=node2", "PATH=/bin"]
    )
    assert parse_environment(text) == {"SLURM_PROCID": "3", "SLURMD_NODENAME": "node2"}


def test_a_semicolon_within_a_nul_separated_value_starts_no_variable() -> None:
    assert parse_environment("FOO=a;RANK=9\0SLURM_PROCID=1") == {"SLURM_PROCID": "1"}


def test_the_workers_own_rank_goes_before_that_of_its_launcher() -> None:
    environment = {"RANK": "5", "SLURM_PROCID": "1", "SLURM_JOB_ID": "17", "WORLD_SIZE": "8"}
    identity = identity_of(environment, "host")
    assert (identity.rank, identity.node, identity.job_id, identity.world_size) == (5, "host", "17", 8)


@pytest.mark.parametrize("rank", ["", "-1", "1e3", "x; rm -rf /"])
def test_a_rank_that_is_no_number_is_unknown(rank: str) -> None:
    assert identity_of({"RANK": rank}, None).rank is None


def test_a_report_shows_no_other_environment(export) -> None:
    export.environment("SECRET=hunter2\0SLURM_PROCID=4\0SLURM_JOB_ID=9").domains().range(0, 10, "step", payload=0)
    report = read_report(export.path, export.path)
    assert report.identity.rank == 4
    assert "hunter2" not in repr(report)
