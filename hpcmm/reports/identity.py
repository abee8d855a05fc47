"""Which rank, node and job a report belongs to, from the environment that nsys captured with it.

The captured environment holds secrets. Only the keys of :data:`IDENTITY_KEYS` ever leave this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpcmm.reports.sqlite import ReportDatabase

RANK_KEYS = ("RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""The most specific first: under ``torchrun`` a worker's RANK differs from the SLURM_PROCID of its launcher."""
NODE_KEYS = ("SLURMD_NODENAME",)
JOB_KEYS = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID")
WORLD_KEYS = ("WORLD_SIZE",)
IDENTITY_KEYS = frozenset(RANK_KEYS + NODE_KEYS + JOB_KEYS + WORLD_KEYS)

_SEMICOLON_PAIR = re.compile(r"(?:^|;)([A-Za-z_][A-Za-z0-9_]*)=([^;]*)")


@dataclass(frozen=True, slots=True)
class Identity:
    """Rank, node and job of the process that nsys started; None where the report does not tell."""

    rank: int | None
    node: str | None
    job_id: str | None
    world_size: int | None = None


_NUMBER = re.compile("[0-9]{1,7}")


def read_identity(database: ReportDatabase) -> Identity:
    """Identity of the report behind ``database``."""
    environment = _captured_environment(database)
    return identity_of(environment, _hostname(database))


def identity_of(environment: Mapping[str, str], hostname: str | None) -> Identity:
    """Identity from environment values; ``hostname`` is the node's name where Slurm did not give one."""
    ranks = (environment[key] for key in RANK_KEYS if _NUMBER.fullmatch(environment.get(key, "")))
    rank = next(ranks, None)
    node = next((environment[key] for key in NODE_KEYS if environment.get(key)), hostname)
    job_id = next((environment[key] for key in JOB_KEYS if environment.get(key)), None)
    world = next((environment[key] for key in WORLD_KEYS if _NUMBER.fullmatch(environment.get(key, ""))), None)
    return Identity(
        rank=int(rank) if rank is not None else None,
        node=node,
        job_id=job_id,
        world_size=int(world) if world is not None else None,
    )


def parse_environment(text: str) -> dict[str, str]:
    """The allow-listed variables in an environment as nsys stores it.

    nsys 2022.4 separates with NUL, 2026.2 with a semicolon, which values may hold too.
    """
    if "\0" in text:
        pairs = [tuple(entry.split("=", 1)) for entry in text.split("\0") if "=" in entry]
    else:
        pairs = _SEMICOLON_PAIR.findall(text)
    return {key: value for key, value in pairs if key in IDENTITY_KEYS}


def _captured_environment(database: ReportDatabase) -> dict[str, str]:
    environment: dict[str, str] = {}
    if database.has("META_DATA_CAPTURE", "name", "value"):
        rows = database.rows("SELECT value FROM META_DATA_CAPTURE WHERE name LIKE 'PROCESS_0:ENVIRONMENT_VARIABLE'")
        for (value,) in rows:
            key, _, quoted = str(value).partition("=")
            if key in IDENTITY_KEYS:
                environment[key] = quoted.strip('"')
    if database.has("TARGET_INFO_SYSTEM_ENV", "name", "value"):
        for (value,) in database.rows("SELECT value FROM TARGET_INFO_SYSTEM_ENV WHERE name = 'DeviceEnvironment'"):
            environment.update(parse_environment(str(value)))
    return environment


def _hostname(database: ReportDatabase) -> str | None:
    if not database.has("TARGET_INFO_SYSTEM_ENV", "name", "value"):
        return None
    rows = database.rows("SELECT value FROM TARGET_INFO_SYSTEM_ENV WHERE name = 'Hostname' LIMIT 1")
    return str(rows[0][0]) if rows and rows[0][0] else None
