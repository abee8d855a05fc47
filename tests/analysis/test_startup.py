"""The table of the start's parts."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmm.analysis.time_tables import STARTUP_COLUMNS, FirstStep, startup_table


def part(name, duration_s, attempt=1):
    return {"event": "startup", "part": name, "duration_s": duration_s, "attempt": attempt}


def step(number, step_s, attempt=1, event="step"):
    return {"event": event, "step": number, "step_s": step_s, "attempt": attempt}


def test_each_part_has_its_median_and_its_slowest_rank_in_the_order_of_time():
    records = {
        0: [{"event": "start", "attempt": 1}, part("imports", 2.0), part("engine", 1.0), step(0, 0.5), step(1, 0.1)],
        1: [part("imports", 5.0), part("engine", 1.5), step(0, 0.75), step(1, 0.1)],
        2: [part("imports", 3.0), part("engine", 1.0), step(0, 0.5)],
    }
    assert startup_table(records).to_dict("records") == [
        {"attempt": 1, "part": "imports", "median_s": 3.0, "longest_s": 5.0, "slowest_rank": 1, "ranks": 3},
        {"attempt": 1, "part": "engine", "median_s": 1.0, "longest_s": 1.5, "slowest_rank": 1, "ranks": 3},
        {"attempt": 1, "part": "first step", "median_s": 0.5, "longest_s": 0.75, "slowest_rank": 1, "ranks": 3},
    ]


def test_attempts_are_kept_apart_and_a_lost_step_was_a_step_of_its_attempt():
    records = {
        0: [
            part("imports", 1.0), step(0, 0.25, event="lost"),
            part("imports", 2.0, 2), step(0, 0.5, 2), step(1, 0.1, 2),
        ]
    }  # fmt: skip
    table = startup_table(records)
    assert list(zip(table["attempt"], table["part"], table["median_s"], strict=True)) == [
        (1, "imports", 1.0), (1, "first step", 0.25), (2, "imports", 2.0), (2, "first step", 0.5),
    ]  # fmt: skip


def test_of_a_program_that_notes_no_step_the_reports_tell_of_the_first():
    records = {0: [part("prepare", 1.0), part("prepare", 2.0, 2), part("srun", 0.5, 2)], 1: [part("prepare", 2.0, 2)]}
    firsts = [FirstStep(0, 8.0, 0.5), FirstStep(1, 10.0, 0.25), FirstStep(2, 9.0, 0.5)]
    table = startup_table(records, firsts)
    assert list(zip(table["attempt"], table["part"], table["median_s"], table["ranks"], strict=True)) == [
        (1, "prepare", 1.0, 1), (2, "prepare", 2.0, 2), (2, "srun", 0.5, 1),
        (2, "imports and set-up", 9.0, 3), (2, "first step", 0.5, 3),
    ]  # fmt: skip
    noted = {0: [*records[0], step(0, 0.75, 2)]}
    assert startup_table(noted, firsts).equals(startup_table(noted))
    assert list(startup_table({}, firsts)["part"]) == ["before the first step", "first step"]


values = st.one_of(st.none(), st.integers(-5, 5), st.floats(), st.text(max_size=3))
damaged = st.fixed_dictionaries(
    {"event": st.sampled_from(["startup", "step", None, 5])},
    optional=dict.fromkeys(("attempt", "part", "duration_s", "step_s"), values),
)


@settings(max_examples=40)
@given(st.dictionaries(st.integers(0, 3), st.lists(damaged | st.just(part("imports", 1.0)))))
def test_damaged_records_are_left_out(records):
    table = startup_table(records)
    assert list(table.columns) == list(STARTUP_COLUMNS)
    sound = sum(part("imports", 1.0) in of_rank for of_rank in records.values())
    assert table[(table["part"] == "imports") & (table["attempt"] == 1)]["ranks"].sum() == sound
    assert all(math.isfinite(value) for value in table["longest_s"])
