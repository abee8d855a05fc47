"""What each rank's environment said, as far as it may be shown."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from hpcmm.analysis.report_inventory import ReportFacts
from hpcmm.analysis.trace import RankTrace

COLUMNS = ["rank", "node", "variable", "value"]


def environment_table(used: Sequence[tuple[ReportFacts, RankTrace]]) -> pd.DataFrame:
    """Variables of the program that nsys started, by rank (COLUMNS); ``[redacted]`` for values that may be secrets.

    Ranks that were captured in one report share its environment, which is that of their launcher.
    """
    rows = [
        (trace.rank, trace.node, variable, value)
        for fact, trace in used
        for variable, value in sorted(fact.identity.environment.items())
    ]
    return pd.DataFrame(rows, columns=COLUMNS)
