"""What makes a frame a table: made on first use, one type a column, no mixed values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pandas as pd

UNITS = ("_s", "_s_per_step", "_bytes_per_s", "_share", "_ppm", "_efficiency", "_scaling")
"""Ends of the names of columns that hold real numbers."""
INTEGERS = frozenset(
    {
        "attempt",
        "bytes",
        "calls",
        "collectives",
        "events",
        "late_rank",
        "nodes",
        "rank",
        "rank_order",
        "ranks",
        "reports",
    }
    | {"sequence", "slowest_rank", "step", "steps", "waited_for_rank", "pid", "device", "kernels", "copies"}
)
FLAGS = frozenset({"complete", "corrected", "estimators_disagree", "warmup"})
RATIOS = frozenset({"variation", "load_balance", "load_balance_in_node", "load_balance_between_nodes"})


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with a type for each column that has none: an empty table has the types of a full one.

    Columns that their maker has given a type keep it.
    """
    kinds = {name: _kind(str(name)) for name, dtype in frame.dtypes.items() if pd.api.types.is_object_dtype(dtype)}
    return frame.astype(kinds) if kinds else frame


def _kind(name: str) -> str:
    if name in INTEGERS:
        return "Int64"
    if name in FLAGS:
        return "bool"
    if name in RATIOS or name.endswith(UNITS):
        return "float64"
    return "str"


class Tables(Mapping[str, pd.DataFrame]):
    """Tables by name, each made when it is first asked for, and once."""

    def __init__(self, makers: Mapping[str, Callable[[], pd.DataFrame]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._made:
            self._made[name] = typed(self._makers[name]())
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
