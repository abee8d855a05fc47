"""From the nsys reports of a run to tables that say where its time went.

In a notebook or script::

    from hpcmm.analyze import analyze

    run = analyze("runs/latest")     # reads the reports, writes nothing
    run.bottlenecks()                # a pandas DataFrame; one call a table

On the command line: ``python -m hpcmm.analyze --help``.
"""

from hpcmm.analysis.choice import Choice
from hpcmm.analyze.analysis import Analysis, analyze
from hpcmm.analyze.runs import compare

__all__ = ["Analysis", "Choice", "analyze", "compare"]
