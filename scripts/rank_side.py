"""Print the files that run in the job's Python, as pyproject.toml lists them, for the linter of its oldest version."""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def files() -> list[str]:
    """Paths from the top of the project."""
    listed = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["ruff"]["per-file-target-version"]
    return [name for name, version in listed.items() if version == "py39"]


if __name__ == "__main__":
    print(*files())
