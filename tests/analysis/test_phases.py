import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from simulated import make_trace

from hpcmm.analysis import phases
from hpcmm.analysis.phases import BACK_TO_BACK_NS, find_steps, flatten, settle_steps, work_on_devices
from hpcmm.analysis.trace import OTHER, OUTSIDE, DeviceWork
from hpcmm.reports.report import UNKNOWN


def frame(rows: list[tuple]) -> pd.DataFrame:
    """Rows of (name, start, end, payload, closed)."""
    made = pd.DataFrame(rows, columns=["name", "start_ns", "end_ns", "payload", "closed"])
    return made.astype({"payload": "Int64", "closed": bool})


def pieces(rows: list[tuple]) -> list[tuple]:
    ranges = frame(rows)
    return list(flatten(ranges, find_steps(ranges)).itertuples(index=False, name=None))


def test_phases_and_gaps_partition_the_step() -> None:
    rows = [("step", 0, 100, 7, True), ("data", 10, 30, None, True), ("forward", 30, 90, None, True)]
    assert pieces(rows) == [(7, OTHER, 0, 10), (7, "data", 10, 30), (7, "forward", 30, 90), (7, OTHER, 90, 100)]


def test_time_belongs_to_the_innermost_phase() -> None:
    rows = [("step", 0, 50, 0, True), ("forward", 0, 50, None, True), ("loss", 20, 30, None, True)]
    assert pieces(rows) == [(0, "forward", 0, 20), (0, "loss", 20, 30), (0, "forward", 30, 50)]


def test_a_phase_outside_any_step_keeps_no_step() -> None:
    rows = [("step", 0, 10, 0, True), ("evaluate", 20, 40, None, True)]
    assert pieces(rows)[-1] == (OUTSIDE, "evaluate", 20, 40)


def test_adjoining_steps_stay_apart() -> None:
    assert pieces([("step", 0, 10, 0, True), ("step", 10, 20, 1, True)]) == [(0, OTHER, 0, 10), (1, OTHER, 10, 20)]


def test_an_open_step_ends_where_the_next_begins() -> None:
    steps = find_steps(frame([("step", 0, 99, 0, False), ("step", 10, 20, 1, True)]))
    assert steps[["step", "start_ns", "end_ns"]].to_numpy().tolist() == [[0, 0, 10], [1, 10, 20]]


def test_step_numbers_are_payloads_or_else_ordinals() -> None:
    assert list(find_steps(frame([("step", 0, 1, 40, True), ("step", 1, 2, 41, True)]))["step"]) == [40, 41]
    assert list(find_steps(frame([("step", 0, 1, None, True), ("step", 1, 2, None, True)]))["step"]) == [0, 1]
    assert list(find_steps(frame([("step", 0, 1, 5, True), ("step", 1, 2, 5, True)]))["step"]) == [0, 1]
    assert list(find_steps(frame([("step", 0, 1, 3, True), ("step", 1, 2, None, True)]))["step"]) == [3]


ranges = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.integers(0, 50)), max_size=10)


@given(ranges, st.lists(st.integers(1, 20), max_size=4))
def test_any_ranges_even_misnested_give_disjoint_segments_that_fill_the_steps(phases, lengths) -> None:
    rows = [(name, start, max(start, end), None, True) for name, start, end in phases]
    at = 0
    for number, length in enumerate(lengths):
        rows.append(("step", at, at + length, number, True))
        at += length
    made = frame(rows)
    steps = find_steps(made)
    segments = flatten(made, steps)
    assert (segments["end_ns"].to_numpy()[:-1] <= segments["start_ns"].to_numpy()[1:]).all()
    inside = segments[segments["step"] != OUTSIDE]
    filled = (inside["end_ns"] - inside["start_ns"]).groupby(inside["step"]).sum()
    assert filled.to_dict() == dict(enumerate(lengths))


def test_phases_beyond_a_hundred_names_are_taken_together() -> None:
    def trace(rank: int, names: list[str]):
        segments = [(0, name, 100 * at, 100 * at + 10 + at) for at, name in enumerate(names)]
        return make_trace(rank, "n", segments, [("all_reduce", 0, 4, 5, 6, 0, names[0])])

    few = [trace(rank, ["data", "forward"]) for rank in range(2)]
    assert phases.group_rare_phases(few) == few
    many = phases.group_rare_phases([trace(rank, [f"phase {at}" for at in range(400)]) for rank in range(2)])
    names = set(many[0].segments["phase"])
    assert len(names) == phases.MAX_PHASES
    assert {"phase 399", phases.OTHERS} < names
    assert "phase 0" not in names
    assert set(many[1].collectives["phase"]) == {phases.OTHERS}
    assert (many[0].segments["end_ns"] - many[0].segments["start_ns"]).sum() == sum(10 + at for at in range(400))


def settled(rows: list[tuple], pids: list[int] | None = None) -> list[tuple]:
    """Steps that are left of ranges in the annotation's domain: their end, and whether they are closed."""
    ranges = frame(rows).assign(domain="hpcmm", pid=pids or [1] * len(rows), tid=1)
    left = settle_steps(ranges)
    return list(left.loc[left["name"] == "step", ["end_ns", "closed"]].itertuples(index=False, name=None))


AUTOMATIC = "step (automatic)"


def test_automatic_steps_count_if_the_process_has_no_other() -> None:
    rows = [(AUTOMATIC, 0, 10, 0, True), ("data", 8, 9, None, True), ("step", 10, 20, 0, True)]
    assert settled(rows) == [(20, True)]
    assert settled([(AUTOMATIC, 0, 8, 0, True), *rows], pids=[2, 1, 1, 1]) == [(8, False), (20, True)]


def test_the_last_automatic_step_ends_with_its_optimizer() -> None:
    rows = [(AUTOMATIC, 0, 10, 0, True), (AUTOMATIC, 10, 900, 1, True), ("backward", 11, 13, None, True)]
    assert settled([*rows, ("optimizer", 13, 15, None, True)]) == [(10, True), (15, True)]


def test_the_last_automatic_step_is_open_if_its_optimizer_is_missing() -> None:
    rows = [(AUTOMATIC, 0, 900, 1, True), ("optimizer", 11, 13, None, True), ("backward", 13, 15, None, True)]
    assert settled(rows) == [(900, False)]


def test_the_last_automatic_step_is_whole_if_its_loader_ended_and_none_if_it_only_fetched() -> None:
    step, update, fetch = (AUTOMATIC, 0, 15, 1, True), ("optimizer", 11, 13, None, True), ("data", 13, 14, None, True)
    assert settled([step, update, fetch]) == [(15, True)]
    assert settled([step, fetch]) == []


HOST = pd.DataFrame(
    [(0, "forward", 0, 1_000), (0, "backward", 1_000, 2_000), (0, "optimizer", 2_000, 900_000)],
    columns=["step", "phase", "start_ns", "end_ns"],
)


def on_device(*rows: tuple[int, int, int, bool]) -> DeviceWork:
    """From rows of (launch, start, end, communicates)."""
    made = pd.DataFrame(rows, columns=["launch_ns", "start_ns", "end_ns", "communicates"])
    return work_on_devices(made, made["communicates"].to_numpy(bool), HOST)


def stretches(work: DeviceWork) -> dict[str, list[tuple[int, int]]]:
    return {
        phase: list(zip(own.start_ns.tolist(), own.end_ns.tolist(), strict=True))
        for phase, own in work.by_phase.items()
    }


def test_a_kernel_belongs_to_the_phase_that_launched_it_whenever_it_runs() -> None:
    work = on_device((500, 100_000, 200_000, False), (1_500, 200_000, 300_000, False))
    assert stretches(work) == {"forward": [(100_000, 200_000)], "backward": [(200_000, 300_000)]}


def test_what_a_device_needs_between_two_kernels_is_theirs() -> None:
    end = 100_000
    work = on_device((1, 0, end, False), (2, end + BACK_TO_BACK_NS, 150_000, False), (3, 200_000, 210_000, False))
    assert stretches(work) == {"forward": [(0, 150_000), (200_000, 210_000)]}


def test_phases_that_overlap_on_several_streams_are_counted_once() -> None:
    work = on_device((500, 0, 100_000, False), (1_500, 50_000, 150_000, False))
    assert stretches(work) == {"forward": [(0, 100_000)], "backward": [(100_000, 150_000)]}


def test_communication_is_what_nothing_else_runs_beside() -> None:
    work = on_device((500, 0, 100_000, False), (600, 50_000, 300_000, True))
    assert (work.communication.start_ns.tolist(), work.communication.end_ns.tolist()) == ([100_000], [300_000])
    assert work.busy.total_ns == 300_000


def test_kernels_of_unknown_launch_stay_with_the_host_and_those_outside_have_no_phase() -> None:
    work = on_device((UNKNOWN, 0, 100_000, False), (950_000, 960_000, 970_000, False))
    assert stretches(work) == {"": [(960_000, 970_000)]}


def test_work_of_devices_moves_with_the_clock_and_joins() -> None:
    work = on_device((500, 0, 100_000, False), (600, 100_000, 300_000, True))
    later = work.on_clock(lambda times: times + 1_000_000)
    both = work.followed_by(later)
    assert stretches(both) == {"forward": [(0, 100_000), (1_000_000, 1_100_000)]}
    assert both.communication.total_ns == 400_000
    assert stretches(both.renamed("rest{}".format)) == {"restforward": stretches(both)["forward"]}


def test_no_activity_is_no_work() -> None:
    assert on_device().busy.total_ns == 0
    assert len(on_device().communication) == 0
