"""apt sources with contrib and non-free are derived from the machine's own, in both of apt's formats."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "non_free_sources.py"
DEBIAN = {("http://mirror.test/debian", "trixie"), ("http://mirror.test/debian", "trixie-updates")}


@pytest.fixture(scope="module")
def sources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("non_free_sources", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_line_entry_keeps_mirror_suite_key_and_architectures(sources: ModuleType) -> None:
    text = "deb [signed-by=/keys/a.gpg arch=amd64,i386] http://mirror.test/debian/ trixie main # ours\n"

    assert sources.derive({"sources.list": text}, DEBIAN) == (
        "Types: deb\nURIs: http://mirror.test/debian/\nSuites: trixie\nComponents: contrib non-free\n"
        "Signed-By: /keys/a.gpg\nArchitectures: amd64 i386\n"
    )


def test_deb822_entry_keeps_an_embedded_key_and_drops_sources(sources: ModuleType) -> None:
    text = (
        "# ours\ntypes: deb deb-src\nURIs: http://mirror.test/debian\nSuites: trixie trixie-updates\n"
        "Components: main contrib\nSigned-By:\n -----BEGIN-----\n .\n mQ\n -----END-----\n"
    )

    assert sources.derive({"debian.sources": text}, DEBIAN) == (
        "Types: deb\nURIs: http://mirror.test/debian\nSuites: trixie trixie-updates\nComponents: non-free\n"
        "Signed-By: \n -----BEGIN-----\n .\n mQ\n -----END-----\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        "deb http://other.test/apt trixie main",
        "deb http://mirror.test/debian trixie main contrib non-free non-free-firmware",
        "deb http://mirror.test/debian trixie contrib",
        "deb-src http://mirror.test/debian trixie main",
        "# deb http://mirror.test/debian trixie main",
    ],
)
def test_nothing_is_added_for_other_repositories_or_what_is_there(sources: ModuleType, line: str) -> None:
    assert sources.derive({"sources.list": f"{line}\n"}, DEBIAN) == ""


def test_a_disabled_entry_and_a_repeated_one_add_nothing_more(sources: ModuleType) -> None:
    entry = "Types: deb\nURIs: http://mirror.test/debian\nSuites: trixie\nComponents: main\n"
    files = {"a.sources": f"Enabled: no\n{entry}", "b.sources": entry, "c.sources": entry}

    assert sources.derive(files, DEBIAN) == entry.replace("main", "contrib non-free")
