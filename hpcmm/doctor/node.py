"""``python -m hpcmm.doctor.node REQUEST``: one process on each node of a job step; it writes its word beside REQUEST.
``... here NSYS FOLDER...`` prints what this machine tells of itself, with NSYS=yes also whether nsys records.

It tells of itself first (:func:`node_facts`), which asks no other node and imports no torch. Then the nodes meet: the
first node listens, the others come to it. Who has come is told to all, and only these measure with each other.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import Any

from hpcmm.cli import run_command
from hpcmm.doctor.rendezvous import answer_clock, come, gather, measure_offset
from hpcmm.errors import HpcmmError
from hpcmm.files import json_object, read_checked, write_whole
from hpcmm.node.cache import make_folder
from hpcmm.node.network import find_free_port, job_nodes, listening_socket
from hpcmm.nsys.probe import nsys_problem
from hpcmm.resources import keep_compiled_code_to_oneself
from hpcmm.runs.ownership import Reach, exchangeable

_MEET_S, _TALK_S, _MEASURE_S, _SHARED_S = 30.0, 120.0, 60.0, 20.0
_GPU_FIELDS = (
    "index,name,uuid,temperature.gpu,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown,"
    "pcie.link.width.current,pcie.link.width.max"
)
_TIMEOUT_S = 30
_MOST_BYTES = 1024
"""Of a name of a node."""


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == "here":
        print(json.dumps(facts_here([Path(each) for each in arguments[2:]], nsys=arguments[1] == "yes")))
        return 0
    request_file = Path(arguments[0])
    request = _read_request(request_file)
    nodes = list(request["nodes"] or job_nodes(os.environ))
    folders = [Path(folder) for folder in request["folders"]]
    found = node_facts(folders)
    if found["node"] not in nodes or not all(map(is_name_of_node, nodes)):
        raise HpcmmError(f"{found['node']} is none of the nodes that are to be checked: {', '.join(nodes)}.")
    place = nodes.index(found["node"])
    found["names"] = {node: _address(node) for node in nodes}
    for folder in folders:
        _leave_token(token_file(folder, request_id(request_file), request["secret"], nodes[place]), nodes[place], found)
    try:
        _with_others(request, request_file.parent, nodes, place, found)
    except OSError as error:
        found["problem"] = f"it did not meet the other nodes at {nodes[0]}: {error}"
    if request["nsys"]:
        _check_nsys(found)
    _write(found, request_file.parent / f"{nodes[place]}.json")
    return 0


def facts_here(folders: list[Path], *, nsys: bool) -> dict[str, Any]:
    """As :func:`node_facts`; ``nsys``: also whether nsys records a range of this Python."""
    found = node_facts(folders)
    if nsys:
        _check_nsys(found)
    return found


def _check_nsys(found: dict[str, Any]) -> None:
    if found["nsys"] and "nvtx" in found["packages"]:
        found["nsys_problem"], found["nsys_checked"] = nsys_problem(found["nsys"]), True


def request_id(request_file: Path) -> str:
    """A check's own word, from the name of its folder. Raises HpcmmError for a folder that is none of a check."""
    named = re.fullmatch(r"\.hpcmm-doctor-([0-9a-f]{16})", request_file.parent.name)
    if named is None:
        raise HpcmmError(f"{request_file} is no request of a check: run python -m hpcmm.doctor.")
    return named[1]


def is_name_of_node(name: str) -> bool:
    """Whether a node can be called so; the name becomes one of files."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", name) is not None


def _read_request(request_file: Path) -> dict[str, Any]:
    """Raises HpcmmError if it is none, or if another user could have written it."""
    try:
        text, writer = read_checked(request_file)
    except (OSError, ValueError) as error:
        raise HpcmmError(f"{request_file} cannot be read ({error}): is runs_root shared by all nodes?") from error
    if writer is not None:
        raise HpcmmError(f"{writer} can be written by another user, so what it asks is not done.")
    request = json_object(text) or {}
    nodes, folders = request.get("nodes"), request.get("folders")
    lists = [folders, *([] if nodes is None else [nodes])]
    are_words = all(isinstance(each, list) and all(isinstance(word, str) for word in each) for each in lists)
    if not are_words or not isinstance(request.get("secret"), str) or not isinstance(request.get("nsys"), bool):
        raise HpcmmError(f"{request_file} is no request of a check: run python -m hpcmm.doctor.")
    return request


def _with_others(request: dict[str, Any], folder: Path, nodes: list[str], place: int, found: dict[str, Any]) -> None:
    port_file = folder / "port"
    if place == 0:
        with listening_socket(backlog=4096) as server:
            _write(server.getsockname()[1], port_file)
            came = gather(server, request["secret"], nodes[1:], _MEET_S, _TALK_S)
        present = [nodes[0], *(node for node in nodes[1:] if node in came)]
        lines = {node: line for node, (line, _) in came.items()}
        addresses = {node: came[node][1]["address"] for node in present[1:]}
        own = next((lines[node].own_address for node in present[1:]), "127.0.0.1")
        told: dict[str, Any] = {"members": present, "address": own, "port": find_free_port(own)}
        for node in present[1:]:
            lines[node].send(told)
            answer_clock(lines[node])  # one after the other, so that none waits while its clock is read
        found["came"] = addresses
        found["clock"] = {"offset_s": 0.0, "error_s": 0.0}
    else:
        port = _read_port(port_file)
        hello = {"secret": request["secret"], "node": nodes[place], "address": found["names"][nodes[place]]}
        line = come((nodes[0], port), hello, _MEET_S, _TALK_S)
        told = line.receive()
        if not _is_told(told, nodes[place]):
            raise ConnectionError("the first node sent something else than who has come")
        found["clock"] = asdict(measure_offset(line))
        own = line.own_address
    found["address"] = own
    found["interface"] = next((name for name, each in found["interfaces"].items() if own in each["addresses"]), None)
    members: list[str] = told["members"]
    check = request_id(port_file), request["secret"]
    tokens = {folder: [token_file(Path(folder), *check, node) for node in members] for folder in request["folders"]}
    found["shared"] = _shared(tokens, members)
    if len(members) > 1:
        _measure(told, members.index(nodes[place]), found)


def _is_told(told: Any, node: str) -> bool:
    """Whether this is what the first node tells those that have come."""
    members = told.get("members") if isinstance(told, dict) else None
    are_words = isinstance(members, list) and all(isinstance(each, str) for each in members) and node in members
    return are_words and isinstance(told.get("address"), str) and isinstance(told.get("port"), int)


def _measure(told: dict[str, Any], member: int, found: dict[str, Any]) -> None:
    if find_spec("torch") is None:
        found["all_reduce"] = {"not_measured": "its Python has no torch"}
        return
    keep_compiled_code_to_oneself()
    try:
        from hpcmm.doctor.all_reduce import pair_bandwidths  # noqa: PLC0415 -- imports torch, late and on nodes alone

        backend, pairs = pair_bandwidths(told["address"], told["port"], member, len(told["members"]), _MEASURE_S)
    except (RuntimeError, ImportError, OSError) as error:
        found["all_reduce"] = {"problem": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        return
    names = told["members"]
    found["all_reduce"] = {
        "backend": backend,
        "pairs": [[names[first], names[second], rate] for first, second, rate in pairs],
    }


def _address(node: str) -> str | None:
    try:
        return str(socket.getaddrinfo(node, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def _leave_token(token: Path, node: str, found: dict[str, Any]) -> None:
    """Write a file that the other nodes look for; whoever asked removes all, once every node has looked."""
    folder = token.parent
    changed = exchangeable(folder)
    if changed is not None and changed.reach is Reach.everybody:
        found.setdefault("unwritable", {})[str(folder)] = changed.why
        return
    try:
        make_folder(folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(token, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(node)
    except OSError as error:
        found.setdefault("unwritable", {})[str(folder)] = str(error.strerror)


def token_file(folder: Path, request_id: str, secret: str, node: str) -> Path:
    """The file of one node. Others may write the folder: they know its name no sooner than it is there."""
    named = hashlib.sha256(f"{secret} {node}".encode()).hexdigest()[:32]
    return folder / f"{beginning_of_tokens(request_id)}{named}"


def beginning_of_tokens(request_id: str) -> str:
    return f".hpcmm-doctor-{request_id}-"


def _shared(tokens: Mapping[str, Sequence[Path]], members: Sequence[str]) -> dict[str, list[str]]:
    """For each folder the members whose file this node does not see within some seconds."""
    unseen: dict[str, list[str]] = {}
    until = time.monotonic() + _SHARED_S
    for folder, of_members in tokens.items():
        missing = dict(zip(of_members, members))
        while missing:
            missing = {token: node for token, node in missing.items() if not _sees(token, node)}
            if not missing or time.monotonic() > until:
                break
            time.sleep(0.2)
        unseen[folder] = list(missing.values())
    return unseen


def _sees(token: Path, node: str) -> bool:
    try:
        os.listdir(token.parent)  # noqa: PTH208 -- makes NFS look again
        descriptor = os.open(token, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            is_own = S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid()
            return is_own and file.read(_MOST_BYTES) == node.encode()
    except OSError:
        return False


def _read_port(port_file: Path) -> int:
    until = time.monotonic() + _MEET_S
    while True:
        with contextlib.suppress(OSError, ValueError):
            text, writer = read_checked(port_file)
            if writer is not None:
                raise PermissionError(f"{writer} can be written by another user")
            return int(text)
        if time.monotonic() > until:
            raise TimeoutError(f"{port_file} did not appear: is its folder shared?")
        time.sleep(0.1)


def _write(value: object, path: Path) -> None:
    write_whole(path, json.dumps(value), 0o600)


def node_facts(folders: list[Path]) -> dict[str, Any]:
    """Python, packages, CPUs, memory, network interfaces, GPUs and free disk of this node, as plain values."""
    return {
        "node": node_name(),
        "host_name": socket.gethostname(),
        "python": {"version": platform.python_version(), "prefix": sys.prefix, "machine": platform.machine()},
        "packages": packages(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "interfaces": interfaces(),
        "infiniband": infiniband_ports(),
        "gpus": gpus(),
        "nsys": shutil.which("nsys"),
        "disks": {str(folder): disk(folder) for folder in folders},
    }


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def packages() -> dict[str, str]:
    """Name and version of each installed Python package."""
    found: dict[str, str] = {}
    for each in metadata.distributions():
        name = each.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return found


def interfaces() -> dict[str, dict[str, Any]]:
    """Each network interface that is up: addresses, speed in Mbit/s (0 if the driver does not say), MTU, errors."""
    found = {}
    for name, addresses in interface_addresses().items():
        facts = Path("/sys/class/net") / name
        found[name] = {
            "addresses": addresses,
            "mbit_per_s": max(0, _number(facts / "speed")),  # -1 if it is not known
            "mtu": _number(facts / "mtu"),
            "errors": sum(_number(facts / "statistics" / each) for each in ("rx_errors", "tx_errors")),
        }
    return found


def _number(path: Path) -> int:
    """A whole number of the kernel's; 0 if it has none."""
    try:
        return int(_line(path))
    except ValueError:
        return 0


class _Address(ctypes.Structure):
    """``struct ifaddrs`` of getifaddrs(3), which Python itself has no function for."""


_Address._fields_ = [
    ("next", ctypes.POINTER(_Address)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("broadcast", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]
_RUNNING = 0x40
"""IFF_RUNNING of Linux' net/if.h."""
_OFFSETS = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
"""Where the address stands in its ``sockaddr``, and how many bytes it has."""


def interface_addresses() -> dict[str, list[str]]:
    """The IPv4 and IPv6 addresses of each network interface that runs, by its name. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Address)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    found: dict[str, list[str]] = {}
    try:
        each = first
        while each:
            entry = each.contents
            if entry.flags & _RUNNING:
                addresses = found.setdefault(os.fsdecode(entry.name), [])
                if entry.address and (address := _text_of(entry.address, os.fsdecode(entry.name))):
                    addresses.append(address)
            each = entry.next
    finally:
        libc.freeifaddrs(first)
    return found


def _text_of(sockaddr: int, interface: str) -> str | None:
    """As ``getsockname`` has it; None for an address of another family."""
    family = ctypes.c_ushort.from_address(sockaddr).value
    if family not in _OFFSETS:
        return None
    offset, length = _OFFSETS[socket.AddressFamily(family)]
    text = socket.inet_ntop(family, ctypes.string_at(sockaddr + offset, length))
    return f"{text}%{interface}" if text.startswith("fe80:") else text


def infiniband_ports() -> dict[str, dict[str, str]]:
    """State and rate of each InfiniBand port, in the kernel's words."""
    ports = Path("/sys/class/infiniband").glob("*/ports/*")
    return {f"{port.parent.parent.name}/{port.name}": _port(port) for port in sorted(ports)}


def _port(port: Path) -> dict[str, str]:
    return {name: _line(port / name) for name in ("state", "rate")}


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def gpus() -> dict[str, Any]:
    """What nvidia-smi tells: ``gpus``, a list of its fields each, or ``problem``, why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"gpus": [], "problem": "nvidia-smi is not there"}
    query = [tool, f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"gpus": [], "problem": f"nvidia-smi did not answer ({error})"}
    if done.returncode != 0:
        return {"gpus": [], "problem": f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())[:200]}"}
    return {"gpus": parse_gpus(done.stdout), "problem": None}


def parse_gpus(listed: str) -> list[dict[str, str]]:
    """One dictionary a GPU, by nvidia-smi's names of the fields."""
    names = _GPU_FIELDS.split(",")
    rows = csv.reader(listed.splitlines(), skipinitialspace=True)
    return [dict(zip(names, row)) for row in rows if len(row) == len(names)]


def disk(folder: Path) -> dict[str, Any]:
    """Free and total bytes of a folder's file system, or of that of its nearest parent that exists."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    usage = shutil.disk_usage(there)
    inodes = os.statvfs(there)
    return {
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "free_inodes": inodes.f_favail if inodes.f_files else None,
        "writable": os.access(there, os.W_OK),
    }


if __name__ == "__main__":
    sys.exit(run_command("hpcmm.doctor", main, needs_folder=False))
