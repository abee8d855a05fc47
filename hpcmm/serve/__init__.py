"""``python -m hpcmm.serve``: a trained run behind a page, for those who have its token. See ``--help``.

What the page asks and shows comes from the run's workload (``served``). Here are the server and the Slurm job that it
may be, the ``guard`` in front of all of it, the ``batcher`` (requests of several users together) and the log.
"""
