"""Bus bandwidth of the collectives by operation and size, from table ``collectives``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcmm.analysis.pipeline import Study
from hpcmm.page.headlines import number, plain, seconds, size

MAX_ROWS = 24
"""Those with the most transfer time; the CSV holds all."""


@dataclass(frozen=True, slots=True)
class BandwidthRow:
    """One operation of one group and size; nine tenths of its calls lie in ``width`` percent from ``low`` on."""

    op: str
    group: str
    size: str
    count: str
    transfer: str
    median: str
    low: float
    width: float
    middle: float
    told: str


def bandwidth(study: Study) -> tuple[list[BandwidthRow], int]:
    """Rows by transfer time, and how many are left out."""
    table = study.tables["collectives"]
    rate = table["bus_bytes_per_s"].astype(float)
    table = table[np.isfinite(rate) & (rate > 0) & (table["bytes"] > 0)]
    if table.empty:
        return [], 0
    table = table.assign(scale=np.floor(np.log2(table["bytes"].astype(float))).astype(int))
    grouped = table.groupby(["op", "group", "scale"], observed=True)
    found = grouped.agg(
        bytes=("bytes", "median"), count=("bytes", "size"), ranks=("rank", "nunique"), transfer=("transfer_s", "sum")
    )
    rates = grouped["bus_bytes_per_s"]
    found = found.assign(low=rates.quantile(0.05), median=rates.quantile(0.5), high=rates.quantile(0.95))
    found = found.sort_values("transfer", ascending=False)
    most = float(found["high"].max())
    rows = []
    for row in found.head(MAX_ROWS).reset_index().to_dict("records"):
        low, middle, high = (100 * float(row[name]) / most for name in ("low", "median", "high"))
        told = f"5% to 95%: {size(row['low'])}/s to {size(row['high'])}/s"
        ranks = max(int(row["ranks"]), 1)
        rows.append(
            BandwidthRow(
                plain(row["op"]),
                plain(row["group"]),
                size(row["bytes"]),
                number(round(int(row["count"]) / ranks)),
                seconds(float(row["transfer"]) / ranks),
                f"{size(row['median'])}/s",
                round(low, 2),
                round(max(high - low, 0.4), 2),
                round(middle, 2),
                told,
            )
        )
    return rows, max(0, len(found) - MAX_ROWS)
