"""Each recipe trains as one process does, or is refused before the job: the core of the table, and all of it."""

from __future__ import annotations

import pytest
from cells import Cell, all_cells, run

CORE = [
    Cell("zero2", feature="accumulation"),
    Cell("zero3", "bf16", "LoRA"),
    Cell("zero3, replicated encoders"),
    Cell("ulysses", feature="clipping"),
    Cell("ring of 3"),
    Cell("pipeline x data", feature="accumulation"),
    Cell("tensor", feature="clipping"),
    Cell("expert", trained="all"),
    Cell("3d"),
]
"""One of each kind."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cell", CORE, ids=str)
def test_a_recipe_trains_as_one_process_does(cell: Cell, compiled_ops: None):
    outcome = run(cell)
    assert outcome.refusal == ""
    assert outcome.holds(cell), outcome


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("cell", list(all_cells()), ids=str)
def test_a_cell_holds_or_is_refused(cell: Cell, compiled_ops: None):
    outcome = run(cell)
    assert outcome.refusal or outcome.holds(cell), outcome
