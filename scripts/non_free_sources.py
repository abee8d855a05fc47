#!/usr/bin/env python3
"""Print apt sources that add Debian's contrib and non-free to what this machine already uses, or nothing.

`nsys` is a non-free package that needs one of contrib. Mirrors and keys are the machine's own, so that no host is named
here. Only the standard library is used: this runs before the virtual environment exists.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

COMPONENTS = ("contrib", "non-free")
APT = Path("/etc/apt")

Stanza = dict[str, str]
"""Fields of one entry, named as apt's deb822 format names them."""


def parse_deb822(text: str) -> Iterator[Stanza]:
    """Entries of a ``.sources`` file; a value keeps the line breaks and indents of its continuation lines."""
    for paragraph in re.split(r"\n\s*\n", text):
        stanza: Stanza = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0].isspace():
                stanza[name] += "\n" + line
            else:
                name, _, value = line.partition(":")
                name = "-".join(word.capitalize() for word in name.strip().split("-")).replace("Uris", "URIs")
                stanza[name] = value.strip()
        if stanza:
            yield stanza


def parse_one_line(text: str) -> Iterator[Stanza]:
    """Entries of a ``.list`` file, such as ``deb [signed-by=/a.gpg arch=amd64] URI SUITE main``."""
    names = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(deb|deb-src)\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*([^#]*)(?:#.*)?", line)
        if not match:
            continue
        kind, options, uri, suite, components = match.groups(default="")
        stanza = {"Types": kind, "URIs": uri, "Suites": suite, "Components": components.strip()}
        for key, operation, value in re.findall(r"([\w-]+?)\s*([+-]?)=\s*(\S+)", options):
            name = names.get(key.lower(), key.title()) + {"": "", "+": "-Add", "-": "-Remove"}[operation]
            stanza[name] = value.replace(",", " ")
        yield stanza


def with_non_free(stanza: Stanza, debian: set[tuple[str, str]]) -> Stanza | None:
    """The entry with the missing components in place of its own, or None where nothing is to be added.

    ``debian`` holds the pairs of URI (without a slash behind) and suite that apt knows to be Debian's main.
    """
    components = stanza.get("Components", "").split()
    missing = [name for name in COMPONENTS if name not in components]
    pairs = {(uri.rstrip("/"), suite) for uri in stanza["URIs"].split() for suite in stanza["Suites"].split()}
    enabled = stanza.get("Enabled", "yes").lower() not in {"no", "false", "off", "0", "without", "disable"}
    if not (enabled and "deb" in stanza["Types"].split() and "main" in components and missing and pairs & debian):
        return None
    return stanza | {"Types": "deb", "Components": " ".join(missing)}


def derive(files: dict[str, str], debian: set[tuple[str, str]]) -> str:
    """The text of a ``.sources`` file, from the names and texts of the machine's source files; may be empty."""
    paragraphs = []
    for name, text in files.items():
        for stanza in parse_deb822(text) if name.endswith(".sources") else parse_one_line(text):
            added = with_non_free(stanza, debian) or {}
            paragraphs.append("".join(f"{field}: {value}\n" for field, value in added.items()))
    return "\n".join(dict.fromkeys(filter(None, paragraphs)))


def debian_repositories() -> set[tuple[str, str]]:
    """URI and suite of each repository whose signed index says that it is Debian's own; needs apt's lists."""
    fields = "$(REPO_URI) $(RELEASE)"
    command = ("apt-get", "indextargets", "--format", fields, "Origin: Debian", "Component: main")
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {(uri.rstrip("/"), suite) for uri, suite in (line.rsplit(" ", 1) for line in lines)}


def main() -> int:
    paths = [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))]
    files = {
        str(path): path.read_text(errors="replace")
        for path in paths
        if path.suffix in {".list", ".sources"} and path.is_file()
    }
    print(derive(files, debian_repositories()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
