"""Which colour each kind of time has. The colours themselves are variables of ``assets/report.css``, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hpcmm.analysis.trace import OTHER
from hpcmm.annotate.schema import PHASES

EXTRA = 6
"""Colours for phases that are none of the usual; with more phases than that they repeat."""
WAIT, TRANSFER = "wait", "transfer"


def ordered(phases: Iterable[str]) -> list[str]:
    """The usual phases in their order, then any other by name, then what no phase covers."""
    seen = set(phases)
    usual = [name for name in PHASES if name in seen]
    return [*usual, *sorted(seen - {*PHASES, OTHER}), *([OTHER] if OTHER in seen else [])]


def kinds(phases: Sequence[str]) -> list[str]:
    """The colour of each of ``phases``, as :func:`ordered` gives them: ``data``, ``extra-0``, ``other`` ..."""
    found = []
    extra = 0
    for name in phases:
        if name in (*PHASES, OTHER):
            found.append(name)
        else:
            found.append(f"extra-{extra % EXTRA}")
            extra += 1
    return found
