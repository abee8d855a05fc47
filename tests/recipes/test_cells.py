"""Each recipe trains as one process does, or is refused before the job: the core of the table, and all of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from cells import Cell, all_cells, run

from hpcmm.errors import HpcmmError

VIDEO = Path(__file__).resolve().parents[2] / "examples" / "video_modality"

CORE = [
    Cell("zero2", feature="accumulation"),
    Cell("ulysses", feature="clipping"),
    Cell("expert", trained="all"),
    Cell("3d"),
    Cell("zero3", trained="LoRA", workload="anomaly"),
]
"""One of each family: ``3d`` is a pipeline of tensor groups."""
REST = [
    Cell("zero3", "bf16", "LoRA"),
    Cell("zero3, replicated encoders"),
    Cell("ring of 3"),
    Cell("pipeline x data", feature="accumulation"),
    Cell("tensor", feature="clipping"),
    Cell("zero2", feature="accumulation", workload="anomaly"),
]
"""What the other tests beside this one hold against one process, too."""
REFUSED = {
    Cell(row, workload="anomaly"): f"parallel.mesh.{axis} is 2, but this workload's model"
    for row, axis in {
        "ulysses": "sequence",
        "ring": "sequence",
        "pipeline": "pipeline",
        "tensor": "tensor",
        "expert": "expert",
        "3d": "pipeline",
    }.items()
} | {
    Cell("zero3, replicated encoders", workload="anomaly"): "parallel.encoders=replicated keeps whole encoders",
    Cell("ddp", feature="recomputed activations", workload="anomaly"): "parallel.activation_checkpointing is true",
}
"""What a detector with a convolutional decoder has no parts for; each with the remedy."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cell", [*CORE, *(pytest.param(cell, marks=pytest.mark.long) for cell in REST)], ids=str)
def test_a_recipe_trains_as_one_process_does(cell: Cell, compiled_ops: None):
    outcome = run(cell)
    assert outcome.refusal == ""
    assert outcome.holds(cell), outcome


@dataclass(frozen=True)
class CellWithVideo(Cell):
    """With a modality that hpcmm does not know, of a package and a folder of the user's."""

    def overrides(self) -> list[str]:
        return [*super().overrides(), f"launch.config_dir={VIDEO / 'conf'}", "model.modalities.video=video"]


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("row", ["zero1", "zero3", "pipeline", "tensor, replicated encoders"])
def test_a_modality_of_the_users_own_is_spread_as_others_are(
    row: str, compiled_ops: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(VIDEO)
    cell = CellWithVideo(row)
    outcome = run(cell)
    assert outcome.holds(cell), outcome


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_what_a_model_cannot_do_is_refused_before_the_job(cell: Cell):
    with pytest.raises(HpcmmError) as refused:
        cell.config()
    assert str(refused.value).startswith(REFUSED[cell])
    assert "leave it out" in str(refused.value)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("cell", list(all_cells()), ids=str)
def test_a_cell_holds_or_is_refused(cell: Cell, compiled_ops: None):
    outcome = run(cell)
    assert outcome.refusal or outcome.holds(cell), outcome
