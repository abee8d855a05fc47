"""The facts on a run's mesh, on what its ranks exchange, and on what it gets through."""

from types import SimpleNamespace

import pandas as pd

from hpcmm.annotate.schema import GroupMark
from hpcmm.page.headlines import exchanged_line, mesh_line, throughput_line


def study(*marks, exchanged=()):
    """Of one rank that told these groups; ``exchanged``: (step, axis, op, bytes, bus_bytes, warmup)."""
    groups = {mark[0]: GroupMark(*mark) for mark in marks}
    columns = ["step", "axis", "op", "bytes", "bus_bytes", "warmup"]
    table = pd.DataFrame(exchanged, columns=columns).assign(rank=0)
    return SimpleNamespace(traces=[SimpleNamespace(groups=groups)], tables={"comm_bytes": table}, throughput="")


def test_the_mesh_is_told_outermost_axis_first() -> None:
    told = study(
        ("1", "tensor", (0, 1)), ("2", "pipeline", (0, 4)), ("3", "data", (0, 2)), ("4", "data x tensor", (0, 1, 2, 3))
    )
    assert mesh_line(told) == "mesh: pipeline 2 x data 2 x tensor 2"
    assert mesh_line(study()) == ""


def test_experts_are_a_part_of_the_data_axis_and_no_factor() -> None:
    assert mesh_line(study(("1", "expert", (0, 1)), ("2", "data", (0, 1, 2, 3)))) == "mesh: data 4, expert 2"


def test_what_is_exchanged_is_told_by_axis_the_most_first_and_once() -> None:
    rows = [
        (0, "data", "all_reduce", 9_000_000, 9e6, True),
        (1, "data", "all_reduce", 1_000_000, 1e6, False),
        (2, "data", "all_reduce", 1_000_000, 1e6, False),
        (1, "pipeline", "send", 4_000_000, 4e6, False),
        (1, "pipeline", "recv", 4_000_000, 4e6, False),
        (1, "", "all_reduce", 800, 0.0, False),
    ]
    assert exchanged_line(study(exchanged=rows)) == "exchanged a step and rank: 2 MB pipeline, 1 MB data"
    assert exchanged_line(study()) == ""


def test_no_rank_that_noted_anything_is_no_fact() -> None:
    assert throughput_line(study()) == ""
