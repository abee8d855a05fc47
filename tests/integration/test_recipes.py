"""Each recipe on the real local Slurm: requeued in the middle under nsys, with a report that names its groups."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pandas as pd
import pytest
from test_requeue import Job

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.nsys, pytest.mark.timeout(1200)]

STEPS = 48
"""So many that the signal comes before the last one: a step of a small model takes less than a tenth of a second."""
TRAINING = [
    "cluster=local_slurm", "cluster.nodes=2", "cluster.gpus_per_node=0", "task=omni", "train.micro_batch_size=4",
    f"train.steps={STEPS}", "train.evaluate=false", "train.log_every=1",
]  # fmt: skip
SEVERAL = "train.gradient_accumulation_steps=4"


@dataclass(frozen=True)
class Case:
    """A recipe, and what the groups are for in which its ranks exchange more than single numbers."""

    overrides: tuple[str, ...]
    axes: set[str] = field(default_factory=lambda: {"data"})
    ranks: int = 2


CASES = {
    "ddp": Case(("parallel=ddp",)),
    "zero1": Case(("parallel=zero1",)),
    "zero2": Case(("parallel=zero2",)),
    "zero3": Case(("parallel=zero3",)),
    "zero3_offload": Case(("parallel=zero3_offload",)),
    "ulysses": Case(("parallel=ulysses",), {"sequence", "data x sequence"}),
    "ring": Case(("parallel=ring",), {"sequence", "data x sequence"}),
    "pipeline": Case(("parallel=pipeline", SEVERAL), {"pipeline", "data"}, 4),
    "tensor": Case(("parallel=tensor",), {"tensor", "data"}, 4),
    "expert": Case(("parallel=expert", "model/language_model=tiny_mixtral"), {"expert", "data"}),
    "3d": Case(("parallel=3d", SEVERAL), {"pipeline", "tensor"}, 4),
    "expert x tensor": Case(
        ("parallel=expert", "parallel.mesh.tensor=2", "parallel.zero_stage=1", "model/language_model=tiny_qwen3_moe"),
        {"expert", "tensor", "data"}, 4,
    ),
    "replicated encoders": Case(("parallel=tensor", "parallel.encoders=replicated"), {"tensor"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_is_requeued_under_nsys_and_its_report_names_its_groups(name, slurm_cluster, nsys, tmp_path):
    case = CASES[name]
    overrides = [*TRAINING, f"cluster.ranks_per_node={case.ranks // 2}", *case.overrides]
    whole = Job(slurm_cluster, tmp_path / "whole", "profile=off", task=overrides)
    whole.complete(within_s=300)
    cut = Job(slurm_cluster, tmp_path / "cut", "profile=nsys", "analyze=after", task=overrides)
    cut.wait_until(lambda: cut.has_done(1), within_s=300)
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", cut.job_id)
    cut.wait_until(lambda: cut.has_done(STEPS - 1, attempt=2), within_s=300)
    cut.complete()

    assert [record["step"] > 0 for record in cut.records(0, "resume")] == [False, True]
    for rank in range(case.ranks):
        assert cut.records(rank, "lost") == []
        assert cut.losses(rank) == pytest.approx(whole.losses(rank), rel=1e-5)

    analysis = cut.run / "analysis"
    cut.wait_until((analysis / "summary.md").exists, within_s=200)
    assert set(pd.read_csv(analysis / "coverage.csv")["status"]) == {"found"}
    sizes = pd.read_csv(analysis / "collectives.csv").query("bytes >= 4096 and step.notna() and ranks > 1")
    assert case.axes <= set(sizes["axis"])
    assert sizes["axis"].notna().all()
    told = pd.read_csv(analysis / "bottlenecks.csv", keep_default_na=False)
    assert len(told)
    for suggestion in told["suggestion"]:
        assert "PipelineModule" not in suggestion
        assert "fuse small collectives" not in suggestion
        keys = re.findall(r"(?:train|parallel|cluster|data)\.[a-z_.]+=[^\s,]+", suggestion.replace("[...]", "null"))
        validate(compose_run([*overrides, *keys]))
