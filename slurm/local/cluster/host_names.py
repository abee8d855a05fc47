"""The cluster's host names: a marked block in /etc/hosts, which leaves the rest of the file byte for byte as it was."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .errors import ClusterError
from .layout import Layout

HOSTS_FILE = Path("/etc/hosts")
LOOKUP_TIMEOUT_S = 3


def block(layout: Layout, text: str) -> str:
    """What is appended to a hosts file that holds ``text``: it ends the last line first, when that has no end."""
    names = "".join(f"{host.address} {host.name}\n" for host in layout.hosts)
    newline = "" if not text or text.endswith("\n") else "\n"
    return f"{newline}{_begin(layout.root, bool(newline))}\n{names}# end of hpcmm cluster {layout.root}\n"


def without_block(root: Path, text: str) -> str:
    """The hosts file without the block of the cluster in ``root``, as it was before."""
    end = re.escape(f"# end of hpcmm cluster {root}\n")
    for added_newline in (True, False):
        begin = "\n" * added_newline + re.escape(_begin(root, added_newline)) + "\n"
        text = re.sub(f"{begin}.*?{end}", "", text, flags=re.DOTALL)
    return text


def are_written(layout: Layout) -> bool:
    """Whether the hosts file holds this layout's names and addresses."""
    lines = set(_read().splitlines())
    return all(f"{host.address} {host.name}" in lines for host in layout.hosts)


def write(layout: Layout) -> None:
    """Add the block, in place of an older one of this cluster.

    Raises ClusterError when one of the names already means another machine.
    """
    remove(layout.root)
    taken = taken_names(layout)
    if taken:
        raise ClusterError(
            f"The host name {taken[0]} already resolves on this machine; stop the cluster that uses it, or choose "
            "other names with `up --prefix NAME`."
        )
    text = _read()
    _write(text + block(layout, text))


def taken_names(layout: Layout) -> list[str]:
    """The names of a layout that is not up which mean another machine."""
    return _names_that_resolve([host.name for host in layout.hosts])


def owners() -> list[Path]:
    """State directories of the clusters whose names the hosts file holds."""
    return [Path(root) for root in re.findall(r"^# end of hpcmm cluster (/.+)$", _read(), flags=re.MULTILINE)]


def remove(root: Path) -> None:
    """Take the block of the cluster in ``root`` away, when it is there."""
    text = _read()
    cleaned = without_block(root, text)
    if cleaned != text:
        _write(cleaned)


def _read() -> str:
    """As it is: no line break is translated, and no byte is lost that is not UTF-8."""
    return HOSTS_FILE.read_bytes().decode(errors="surrogateescape")


def _write(text: str) -> None:
    # In place and not by renaming a new file over it: in a container /etc/hosts is a mount.
    HOSTS_FILE.write_bytes(text.encode(errors="surrogateescape"))


def _begin(root: Path, added_newline: bool) -> str:
    note = "the line break before this line included" if added_newline else "removed by `down`"
    return f"# begin of hpcmm cluster {root}, {note}"


def _names_that_resolve(names: list[str]) -> list[str]:
    lookups = [
        (name, subprocess.Popen(("getent", "ahosts", name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for name in names
    ]
    taken = []
    for name, lookup in lookups:
        try:
            if lookup.wait(LOOKUP_TIMEOUT_S) == 0:
                taken.append(name)
        except subprocess.TimeoutExpired:  # a name server that does not answer knows no such host
            lookup.kill()
            lookup.wait()
    return taken
