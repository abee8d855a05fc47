"""A real Slurm cluster on one machine: every host a network namespace, everything under one state directory.

Only the standard library is used, so that the system's Python runs it before any virtual environment exists.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the system's Python is not the project's
    sys.exit("The local cluster needs Python 3.11 or later; this is Python " + sys.version.split()[0] + ".")
