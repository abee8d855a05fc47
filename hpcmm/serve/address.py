"""Where a server listens, and what to type to reach it."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import write_whole


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
    """The address in the file; None where there is no such file. Raises HpcmmError where it is no address."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Address(str(values["node"]), int(values["port"]), str(values["token"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HpcmmError(f"{path} does not tell where a server listens: {error}.") from error
