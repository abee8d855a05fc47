"""Verdicts on recorded runs of a user's own scripts (``record.py`` records them afresh)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from own_scripts import SCRIPTS

from hpcmm.analyze import analyze

RECORDINGS = Path(__file__).parent / "recordings"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_row_says_what_the_script_does(name: str) -> None:
    expected = SCRIPTS[name]
    table = analyze([RECORDINGS / name]).bottlenecks()
    first = table.iloc[0]
    assert first["cause"].startswith(expected.cause)
    assert (None if pd.isna(first["rank"]) else int(first["rank"])) == expected.rank
    assert expected.advice in first["suggestion"]
    assert first["node"] == expected.node or expected.rank is not None
    others = table.iloc[1:]
    named = others[others["rank"].notna() | others["node"].astype(bool)]
    if expected.also:
        assert list(zip(named["cause"], named["rank"], strict=True)) == list(expected.also)
    # Four ranks shared two busy cores when this was recorded: one of them may have had less of them.
    assert set(named["confidence"]) <= {"medium", "low"}
    assert named["step_share"].sum() < 0.1
    assert table["step_share"].sum() <= 1.0
    assert not table["suggestion"].str.contains(r"\btrain\.|\bparallel\.|\bdata\.num", regex=True).any()
