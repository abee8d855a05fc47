"""From a run's name to what is served, or to the server of a job: where it listens, and what to type to reach it."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, read_text, write_whole
from hpcmm.jobs.find_run import find_targets
from hpcmm.runs.ownership import require_mine
from hpcmm.runs.run_dir import RunDir, SweepDir

_NODE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")


@dataclass(frozen=True, slots=True)
class Address:
    """A server on the loopback interface of ``node``, for those who know its token."""

    node: str
    port: int
    token: str

    @property
    def url(self) -> str:
        """What to open in a browser of the same machine, or behind the tunnel."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    def tunnel(self, login: str) -> str:
        """What to type on one's own machine, where ``login`` is the login node's name, with the user's in front."""
        return f"ssh -N -L {self.port}:127.0.0.1:{self.port} -J {login} {self.node}"

    def direct_tunnel(self) -> str:
        """The same for a server on the login node itself, ``node``."""
        return f"ssh -N -L {self.port}:127.0.0.1:{self.port} {self.node}"


def new_token() -> str:
    """256 random bits, safe in a URL and in a cookie."""
    return secrets.token_urlsafe(32)


def this_host() -> str:
    """USER@NAME of this machine, as ssh takes it."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or ""
    name = socket.getfqdn()
    name = socket.gethostname() if name.startswith("localhost") else name
    return f"{user}@{name}" if user else name


def write_address(path: Path, address: Address) -> None:
    """Write the file in one step, readable by its owner alone."""
    write_whole(path, json.dumps(asdict(address)), mode=0o600)


def read_address(path: Path) -> Address | None:
    """The address in the file; None where there is no such file. Raises HpcmmError if it is no address."""
    try:
        values = json.loads(read_text(path))
        address = Address(str(values["node"]), int(values["port"]), str(values["token"]))
        if not (_NODE.fullmatch(address.node) and 0 < address.port < 1 << 16 and _TOKEN.fullmatch(address.token)):
            raise ValueError("it holds no node, port and token")  # all are to be pasted into a shell
        return address
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise HpcmmError(f"{path} does not tell where a server listens: {error}.") from error


def find_served_run(asked: str, runs_root: Path) -> RunDir:
    """The newest run of that name that has a checkpoint. Raises HpcmmError if there is none."""
    runs = [target.run for target in find_targets(asked, runs_root) if target.run is not None]
    if not runs:
        raise HpcmmError(f"The run directory of job {asked} is not known: name the directory.")
    trained = [run for run in runs if run.has_checkpoint()]
    if trained:
        return trained[0]
    first = runs[0]
    if is_regular(SweepDir(first.root).ledger):
        raise HpcmmError(f"{first.root} is a sweep: name one of its points, such as {first.root.name}/0000.")
    raise HpcmmError(f"{first.checkpoints} holds no finished checkpoint: has the run trained to its end?")


def find_address(asked: str, runs_root: Path) -> Address:
    """Where the server of a job listens. Raises HpcmmError if none does (yet)."""
    for target in find_targets(asked, runs_root):
        if target.run is not None:
            root = require_mine(target.run.root, "what listens there is theirs, and would get all that you upload")
            if (address := read_address(RunDir(root).address)) is not None:
                return address
    raise HpcmmError(f"No server of {asked} answers: does it wait, or is it over? python -m hpcmm.jobs status {asked}")
