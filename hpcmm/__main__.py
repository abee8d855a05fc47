"""``python -m hpcmm COMMAND``: see ``--help``."""

from __future__ import annotations

import sys

from hpcmm.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m hpcmm"))
