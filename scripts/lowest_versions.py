"""Print pip constraints that ask for the lowest versions that ``pyproject.toml`` allows: ``name==bound``, a line each.

    scripts/lowest_versions.py [EXTRA...]

Of the dependencies themselves, and of those of the named extras. What these require in turn is not held down.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest(requirement: str) -> str:
    """``name==bound`` of a requirement. Raises ValueError if it has no lower bound."""
    parsed = Requirement(requirement)
    bounds = [each.version for each in parsed.specifier if each.operator in (">=", "==", "~=")]
    if not bounds:
        raise ValueError(f"{requirement} of {PYPROJECT.name} has no lower bound.")
    return f"{parsed.name}=={bounds[0]}"


def constraints(extras: Sequence[str]) -> list[str]:
    """A line each. Raises ValueError for an extra that is not there."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    if unknown := set(extras) - set(optional):
        raise ValueError(f"{', '.join(sorted(unknown))}: extras are {', '.join(optional)}.")
    asked = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
    return [lowest(each) for each in asked]


if __name__ == "__main__":
    try:
        print("\n".join(constraints(sys.argv[1:])))
    except ValueError as error:
        sys.exit(f"lowest_versions: {error}")
