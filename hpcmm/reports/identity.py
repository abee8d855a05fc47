"""Which rank, node and job a report belongs to, from the environment that nsys captured with it.

The captured environment holds secrets. Values of variables that :func:`may_be_shown` does not allow never leave this
module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpcmm.errors import HpcmmError
from hpcmm.reports.report import MAX_NAME_LENGTH, Identity
from hpcmm.reports.sqlite import ReportDatabase
from hpcmm.text import printable

RANK_AND_SIZE = {
    "RANK": ("WORLD_SIZE",),
    "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_SIZE",),
    "MV2_COMM_WORLD_RANK": ("MV2_COMM_WORLD_SIZE",),
    "JSM_NAMESPACE_RANK": ("JSM_NAMESPACE_SIZE",),
    "FLUX_TASK_RANK": ("FLUX_JOB_SIZE",),
    "PMIX_RANK": (),
    "PMI_RANK": ("PMI_SIZE",),
    "SUBMITIT_LOCAL_GLOBALID": (),
    "SLURM_PROCID": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
}
"""Variables with a process's rank, and those with the number of ranks that go with each.

The most specific first: a worker of ``torchrun`` has a RANK that differs from the SLURM_PROCID of its launcher, and
``mpirun`` leaves each rank of a node the SLURM_PROCID of the node's daemon.
"""
NODE_KEYS = ("SLURMD_NODENAME",)
JOB_KEYS = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "FLUX_JOB_ID")

SHOWN_KEYS = frozenset(
    {
        *(*RANK_AND_SIZE, *NODE_KEYS, *JOB_KEYS, *(size for sizes in RANK_AND_SIZE.values() for size in sizes)),
        *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING"),
        *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
        *("DS_ACCELERATOR", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
    }
)
SHOWN_PREFIXES = ("GLOO_", "NCCL_", "OMPI_COMM_WORLD_", "SLURM_", "TORCH_NCCL_", "UCX_")
_SECRET = re.compile("AUTH|CREDENTIAL|COOKIE|JWT|KEY|PASS|PRIVATE|SECRET|TOKEN", re.IGNORECASE)
"""A variable with one of these in its name is a secret, unless it is one of SHOWN_KEYS."""
REDACTED = "[redacted]"

_SEMICOLON_PAIR = re.compile(r"(?:^|;)([A-Za-z_][A-Za-z0-9_]*)=([^;]*)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_NUMBER = re.compile("[0-9]{1,7}")
MAX_ENVIRONMENT_BYTES = 4 << 20
"""More than the kernel hands to a process by default."""


def may_be_shown(variable: str) -> bool:
    """Whether the value of an environment variable may appear in an output."""
    if variable in SHOWN_KEYS:
        return True
    return variable.startswith(SHOWN_PREFIXES) and not _SECRET.search(variable)


def read_identity(database: ReportDatabase) -> Identity:
    """Identity of the report behind ``database``; what is damaged there tells nothing."""
    try:
        environment, hostname = _captured_environment(database), _hostname(database)
    except HpcmmError:
        return Identity(None, None, None)
    return identity_of(environment, hostname)


def identity_of(environment: Mapping[str, str], hostname: str | None) -> Identity:
    """Identity from environment values; ``hostname`` is the node's name where Slurm did not give one."""
    source = next((key for key in RANK_AND_SIZE if _number(environment, (key,)) is not None), "RANK")
    return Identity(
        rank=_number(environment, (source,)),
        node=next((environment[key] for key in NODE_KEYS if environment.get(key)), hostname),
        job_id=next((environment[key] for key in JOB_KEYS if environment.get(key)), None),
        world_size=_world_size(environment, source),
        environment=environment,
    )


def _world_size(environment: Mapping[str, str], source: str) -> int | None:
    """How many ranks there are, of which the variable ``source`` tells one; None if that is not told, or not right."""
    told = _number(environment, ("WORLD_SIZE",))
    size = _number(environment, RANK_AND_SIZE[source]) if told is None else told
    rank = _number(environment, (source,)) or 0
    # A batch script has the number of tasks that it may start, and is one process itself.
    if source == "SLURM_PROCID" and told is None and not rank and not _STEP_KEYS & environment.keys():
        return None
    return size if size is not None and size > rank else None


_STEP_KEYS = {"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"}


def _number(environment: Mapping[str, str], keys: tuple[str, ...]) -> int | None:
    return next((int(environment[key]) for key in keys if _NUMBER.fullmatch(environment.get(key, ""))), None)


def parse_environment(text: str) -> dict[str, str]:
    """The variables of an environment as nsys stores it, redacted.

    nsys 2022.4 separates with NUL, 2026.2 with a semicolon, which values may hold too.
    """
    if "\0" in text:
        pairs = [entry.partition("=")[::2] for entry in text.split("\0") if "=" in entry]
    else:
        pairs = _SEMICOLON_PAIR.findall(text)
    return _redact(pairs)


def _redact(pairs: list[tuple[str, str]]) -> dict[str, str]:
    return {
        key[:MAX_NAME_LENGTH]: printable(value[:MAX_NAME_LENGTH]) if may_be_shown(key) else REDACTED
        for key, value in pairs
        if _VARIABLE.fullmatch(key)
    }


def _captured_environment(database: ReportDatabase) -> dict[str, str]:
    """The environment of the process that nsys started. Newer versions write it twice; one of them is unambiguous."""
    if database.has("META_DATA_CAPTURE", "name", "value"):
        rows = database.rows(_environment_query("META_DATA_CAPTURE"), ("PROCESS_0:ENVIRONMENT_VARIABLE",))
        pairs = [_text(value).partition("=")[::2] for (value,) in rows]
        if pairs:
            return _redact([(key, quoted.removeprefix('"').removesuffix('"')) for key, quoted in pairs])
    environment: dict[str, str] = {}
    if database.has("TARGET_INFO_SYSTEM_ENV", "name", "value"):
        for (value,) in database.rows(_environment_query("TARGET_INFO_SYSTEM_ENV"), ("DeviceEnvironment",)):
            environment |= parse_environment(_text(value))
    return environment


def _environment_query(table: str) -> str:
    # As a blob: text would come with its separators escaped.
    return f"SELECT substr(CAST(value AS BLOB), 1, {MAX_ENVIRONMENT_BYTES}) FROM {table} WHERE name = ?"  # noqa: S608


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def _hostname(database: ReportDatabase) -> str | None:
    if not database.has("TARGET_INFO_SYSTEM_ENV", "name", "value"):
        return None
    rows = database.rows(
        f"SELECT substr(value, 1, {MAX_NAME_LENGTH}) FROM TARGET_INFO_SYSTEM_ENV WHERE name = 'Hostname' LIMIT 1"  # noqa: S608
    )
    return str(rows[0][0]) if rows and rows[0][0] else None


MAX_DEVICES = 100_000
"""Rows on devices that are read: one a process and GPU."""


def told_gpus(database: ReportDatabase) -> dict[tuple[int, int], str]:
    """What is the GPU behind each device of a process, by (pid, device): ``uuid ...``, which no two GPUs share, or else
    ``bus ...``, its place in the node. Parts of a GPU (MIG) have UUIDs of their own."""
    if not database.has("TARGET_INFO_CUDA_DEVICE", "cudaId", "pid"):
        return {}
    uuid, number = (database.column("TARGET_INFO_CUDA_DEVICE", name) for name in ("uuid", "gpuId"))
    try:
        rows = database.rows(f"SELECT pid, cudaId, {uuid}, {number} FROM TARGET_INFO_CUDA_DEVICE LIMIT {MAX_DEVICES}")  # noqa: S608
        of_number: dict[object, str] = {}
        if database.has("TARGET_INFO_GPU", "id"):
            whole, bus = (database.column("TARGET_INFO_GPU", name) for name in ("uuid", "busLocation"))
            query = f"SELECT id, {whole}, {bus} FROM TARGET_INFO_GPU LIMIT {MAX_DEVICES}"  # noqa: S608
            of_number = {
                key: f"uuid {str(name).lower()}" if name else f"bus {place}" if place else ""
                for key, name, place in database.rows(query)
            }
    except HpcmmError:
        return {}
    return {
        (pid, device): f"uuid {str(own).lower()}" if own else of_number.get(gpu, "")
        for pid, device, own, gpu in rows
        if isinstance(pid, int) and isinstance(device, int)
    }
