"""``python -m hpcmm.analyze``."""

import sys

from hpcmm.analyze.command import main

if __name__ == "__main__":
    sys.exit(main())
