"""How much memory is left."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_UNKNOWN = 1 << 40
"""Where the kernel does not tell, memory is no limit."""


def available_bytes() -> int:
    """What new processes can use without swapping, as the kernel estimates it."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return _UNKNOWN
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), _UNKNOWN)
