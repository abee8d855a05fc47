"""Analysed samples, one of them with names that try to break out of every output."""

import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from hpcmm.analyze import Analysis, analyze

SAMPLES = Path(__file__).parents[2] / "profiles" / "samples"
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\x1b[31m|\n"


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Analysis:
    return analyze([SAMPLES / "clean"], tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Analysis:
    """The ``slow_data`` run, its phases, group, process, node and report file named to break out."""
    folder = tmp_path_factory.mktemp("hostile") / "reports"
    shutil.copytree(SAMPLES / "slow_data", folder)
    for path in folder.iterdir():
        with sqlite3.connect(path) as connection:
            for table, column in (("StringIds", "value"), ("NVTX_EVENTS", "text")):
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = 'data'", (EVIL,))  # noqa: S608
                connection.execute(
                    f"UPDATE {table} SET {column} = replace({column}, 'group=0', 'group=<b>')"  # noqa: S608
                    f" WHERE {column} LIKE '%group=%'"
                )
            connection.execute("UPDATE PROCESSES SET name = ?", (EVIL + "x" * 1_000_000,))
            environment = connection.execute(
                "SELECT value FROM TARGET_INFO_SYSTEM_ENV WHERE nameEnum = 610"
            ).fetchone()[0]
            changed = re.sub("SLURMD_NODENAME=[^\0]*", lambda found: found[0] + EVIL, environment)
            connection.execute("UPDATE TARGET_INFO_SYSTEM_ENV SET value = ? WHERE nameEnum = 610", (changed,))
        connection.close()
    (folder / "rank_0000.sqlite").rename(folder / "<img src=x onerror=alert(1)>.sqlite")
    return analyze([folder], folder.parent / "out")


@pytest.fixture(scope="session")
def slow_data(tmp_path_factory) -> Analysis:
    return analyze([SAMPLES / "slow_data"], tmp_path_factory.mktemp("slow_data"))


@pytest.fixture(scope="session")
def samples_without_steps(tmp_path_factory) -> Analysis:
    return analyze([SAMPLES / "h100_2gpu_nccl.sqlite"], tmp_path_factory.mktemp("h100"))
