import pytest

from hpcmm.reports.events import read_report
from hpcmm.reports.identity import identity_of, may_be_shown, parse_environment


@pytest.mark.parametrize("separator", ["\0", ";"])
def test_values_that_are_not_allowed_are_redacted(separator: str) -> None:
    text = separator.join(
        [
            "API_TOKEN=hunter2",
            "SLURM_PROCID=3",
            "SLURM_JWT=eyJ",
            "SLURMD_NODENAME=node2",
            "NCCL_DEBUG=INFO",
            "PATH=/bin",
        ]
    )
    assert parse_environment(text) == {
        "API_TOKEN": "[redacted]",
        "SLURM_PROCID": "3",
        "SLURM_JWT": "[redacted]",
        "SLURMD_NODENAME": "node2",
        "NCCL_DEBUG": "INFO",
        "PATH": "[redacted]",
    }


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        ("MASTER_ADDR", True),
        ("CUDA_VISIBLE_DEVICES", True),
        ("SLURM_JOB_NODELIST", True),
        ("SLURM_STEP_KEYRING", False),
        ("NCCL_AUTH_TOKEN", False),
        ("SLURM_MY_password", False),
        ("MASTER_PASSWORD", False),
        ("WANDB_API_KEY", False),
        ("AWS_ACCESS_KEY_ID", False),
    ],
)
def test_what_may_be_shown(variable: str, shown: bool) -> None:
    assert may_be_shown(variable) == shown


def test_a_semicolon_within_a_nul_separated_value_starts_no_variable() -> None:
    assert parse_environment("FOO=a;RANK=9\0SLURM_PROCID=1") == {"FOO": "[redacted]", "SLURM_PROCID": "1"}


def test_of_a_newer_export_the_unambiguous_environment_is_read(export) -> None:
    export.environment("RANK=9;SECRET=a;NCCL_DEBUG=part-of-the-secret")
    export.connection.execute("CREATE TABLE META_DATA_CAPTURE (name TEXT, value TEXT)")
    for value in ('RANK="2"', 'SECRET="a;NCCL_DEBUG=part-of-the-secret"'):
        export.rows("META_DATA_CAPTURE", ("PROCESS_0:ENVIRONMENT_VARIABLE", value))
    report = read_report(export.path, export.path)
    assert report.identity.environment == {"RANK": "2", "SECRET": "[redacted]"}


def test_names_in_an_environment_that_no_shell_would_take_are_left_out() -> None:
    assert parse_environment("<b>=1\0a\nb=2\0RANK=1\x1b[31m\0OK=1") == {"RANK": "1\\x1b[31m", "OK": "[redacted]"}


def test_the_workers_own_rank_goes_before_that_of_its_launcher() -> None:
    environment = {"RANK": "5", "SLURM_PROCID": "1", "SLURM_JOB_ID": "17", "WORLD_SIZE": "8"}
    identity = identity_of(environment, "host")
    assert (identity.rank, identity.node, identity.job_id, identity.world_size) == (5, "host", "17", 8)


@pytest.mark.parametrize(
    ("environment", "rank", "world_size"),
    [
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 5, 8),
        ({"MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "4"}, 2, 4),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, 1, 4),
        ({"PMIX_RANK": "3", "SLURM_PROCID": "0"}, 3, None),
        ({"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "6"}, 1, 6),
        ({"FLUX_TASK_RANK": "7", "FLUX_JOB_SIZE": "8"}, 7, 8),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 3, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, 0, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 0, None),  # of a batch script
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, 4, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "9"}, 1, 2),
        ({"RANK": "1", "OMPI_COMM_WORLD_SIZE": "9"}, 1, None),
        ({"WORLD_SIZE": "8"}, None, 8),
        ({}, None, None),
    ],
)
def test_the_number_of_ranks_is_that_of_whoever_tells_the_rank(
    environment: dict[str, str], rank: int | None, world_size: int | None
) -> None:
    identity = identity_of(environment, None)
    assert (identity.rank, identity.world_size) == (rank, world_size)


@pytest.mark.parametrize("rank", ["", "-1", "1e3", "x; rm -rf /"])
def test_a_rank_that_is_no_number_is_unknown(rank: str) -> None:
    assert identity_of({"RANK": rank}, None).rank is None


def test_a_report_shows_no_other_environment(export) -> None:
    export.environment("SECRET=hunter2\0SLURM_PROCID=4\0SLURM_JOB_ID=9").domains().range(0, 10, "step", payload=0)
    report = read_report(export.path, export.path)
    assert report.identity.rank == 4
    assert "hunter2" not in repr(report)
