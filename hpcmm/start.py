"""``python hpcmm/start.py MODULE ARGUMENTS...``: as ``python -P -m MODULE``, of any Python that can run a rank.

Python has ``-P`` since 3.11 only. Without it ``-m`` looks for modules in the current folder first, which other users
may write. This file is given by its path instead, so that nothing is searched before its first lines have run.
"""

import sys

if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file

import runpy

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
