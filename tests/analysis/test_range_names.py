"""What names of NVTX ranges say, and which of their numbers count."""

import numpy as np
import pandas as pd
import pytest

from hpcmm.analysis.range_names import (
    communicates,
    counted,
    cycles_by_rule,
    looks_like_a_step,
    matching,
    never_a_step,
    part_of_a_step,
    templates,
    without_counters,
    without_micro_batches,
)


@pytest.mark.parametrize(
    ("name", "is_step"),
    [
        ("iteration {n}", True),
        ("training_step_{n}", True),
        ("ProfilerStep#{n}", True),
        ("step", True),
        ("trainstep {n}", True),
        ("Iter: {n}/{n}", True),
        ("epoch {n} step {n}", True),
        ("epoch {n}", False),
        ("Optimizer.step#AdamW.step", False),
        ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", False),
        ("forward_step", False),
        ("eval_step", False),
        ("microbatch {n}", False),
        ("aten::add_", False),
        ("layer {n}", False),
        ("iter {n}/{n} loss={n}", True),
        ("Step {n}: loss={n} lr={n}", True),
        ("step {n} loss {n}", True),
        ("data_time={n} iteration {n}", True),
        ("train/step/{n}", True),
        ("forward step={n} loss={n}", False),
        ("eval: step={n} loss={n}", False),
        ("eval={n} step={n}", False),
        ("forward: {n}", False),
        ("loss={n}", False),
    ],
)
def test_a_name_says_whether_it_may_be_a_step(name: str, is_step: bool) -> None:
    assert looks_like_a_step(name) == is_step
    assert not (is_step and never_a_step(name))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("forward-compute", "forward"),
        ("bwd", "backward"),
        ("loss_backward", "backward"),
        ("forward_backward_func", ""),
        ("optimizer_step", "optimizer"),
        ("opt_step", "optimizer"),
        ("opt", "optimizer"),
        ("opt 125m layer", ""),
        ("step", ""),
        ("load", "data"),
        ("Load {n}", "data"),
        ("load_model", ""),
        ("load_to_gpu", ""),
        ("save_checkpoint", "checkpoint"),
        ("activation_checkpoint", ""),
        ("next_batch", "data"),
        ("data to device", ""),
        ("all_reduce", ""),
        ("step {n} data_time={n}", ""),
    ],
)
def test_a_name_says_which_part_of_a_step_it_is(name: str, part: str) -> None:
    assert part_of_a_step(name) == part


def names_of(*names: str) -> pd.Series:
    return pd.Series(pd.Categorical(names))


def test_numbers_that_count_are_left_out_of_names_and_others_stay() -> None:
    assert set(without_counters(names_of(*(f"iteration {n}" for n in range(9))))) == {"iteration {n}"}
    layers = [f"step {step} layer {layer}" for step in range(20) for layer in range(4)]
    assert set(without_counters(names_of(*layers))) == {f"step {{n}} layer {layer}" for layer in range(4)}
    assert set(without_counters(names_of(*["layer 1", "layer 2"] * 5))) == {"layer 1", "layer 2"}
    assert set(without_counters(names_of("conv2d"))) == {"conv2d"}
    assert len(without_counters(names_of().astype("category"))) == 0


def test_a_name_is_a_template_only_of_several() -> None:
    assert list(templates(["it 1", "it 2", "conv2d, seq = 7"])) == ["it {n}", "it {n}", "conv2d"]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["step 3", "step 4", "step 7"], [3, 4, 7]),
        (["epoch 0 step 1", "epoch 0 step 2", "epoch 1 step 3"], [1, 2, 3]),
        (["100/1", "200/2", "300/3"], [1, 2, 3]),
        (["epoch 0 step 1", "epoch 1 step 0"], [0, 1]),
        (["step 1", "step 1"], None),
        (["step", "step"], None),
        (["step 1", "step 1 of 2"], None),
        ([f"step {10**30}"], None),
        (["iter 3/20 loss=0.9", "iter 4/20 loss=0.8"], [3, 4]),
        (["t=1 step 10", "t=2 step 20"], [10, 20]),
        (["Step 12: loss=nan lr=1e-4", "Step 13: loss=-0.5 lr=1e-05"], [12, 13]),
        (["loss=1.5", "loss=2.5"], None),
        (["step 0x0009", "step 0x000a", "step 0X1F"], [9, 10, 31]),
        ([f"step 0x{2**64 - 2:x}", f"step 0x{2**64 - 1:x}"], None),
        (["step 990", "step 1,990", "step 12,345,678"], [990, 1990, 12345678]),
        (["step 1_990", "step 2_000"], [1990, 2000]),
        (["step 1,100", "step 1,101", "step 2,99"], None),  # epoch and step
        (["conv 128,25 step 1", "conv 128,25 step 2"], [1, 2]),
        (["\\x1b[31mit 7\\x1b[0m", "\x1b[32mit 8\x1b[0m"], [7, 8]),
    ],
)
def test_the_number_that_goes_up_is_the_step_s(names: list[str], numbers: list[int] | None) -> None:
    found = counted(names)
    assert (found is None) if numbers is None else np.array_equal(found, numbers)


@pytest.mark.parametrize(
    ("names", "template"),
    [
        (["loss=0.31", "loss=-1e-4", "loss=nan"], "loss={n}"),
        (["a-1", "a-2"], "a-{n}"),
        (["step 0x0009", "step 0x000a"], "step {n}"),
        (["step 990", "step 1,990"], "step {n}"),
        (["step 1,100", "step 2,99"], "step {n},{n}"),
        (["\\x1b[31mit 1\\x1b[0m", "\\x1b[1;32mit 2\\x1b[0m"], "it {n}"),
        (["bell\\x07 1", "bell\\x07 2"], "bell\N{REPLACEMENT CHARACTER} {n}"),
        (["turned\\u202e 1", "turned\\u202e 2"], "turned\N{REPLACEMENT CHARACTER} {n}"),
    ],
)
def test_values_fold_as_one_number_and_what_steers_a_terminal_is_none(names: list[str], template: str) -> None:
    assert set(templates(names)) == {template}
    assert set(without_counters(names_of(*names))) == {template}


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("fwd 3", "fwd {n}"),
        ("micro_batch 12", "micro_batch {n}"),
        ("Backward#2", "Backward#{n}"),
        ("forward layer 3", "forward layer 3"),
        ("stage 1 forward 2", "stage 1 forward {n}"),
    ],
)
def test_micro_batches_are_alike_and_layers_are_not(name: str, alike: str) -> None:
    assert without_micro_batches(name) == alike


def test_an_expression_means_whole_names_before_parts_of_names() -> None:
    names = names_of("step", "optimizer_step", "step 2")
    assert matching(names, "step").tolist() == [True, False, False]
    assert matching(names, "step.*").tolist() == [True, False, True]
    assert matching(names, "mizer").tolist() == [False, True, False]
    assert not matching(names, "nosuch").any()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["recv", "send_forward", "ncclAllReduce", "all_to_all", "AllToAll", "barrier", "sync grads", "P2P.irecv"],
            True,
        ),
        (["forward", "copy all to device", "gather metrics", "sync", "reduce_lr", "optimizer.step", "commit"], False),
    ],
)
def test_a_name_says_that_a_phase_communicates(names: list[str], says: bool) -> None:
    assert [name for name in names if communicates(name) != says] == []


def steps_of(*loop: str) -> dict[str, int]:
    """The number of steps by each rule, of ranges that take as long as each other."""
    labels = pd.Series(" ".join(loop).split())
    found = cycles_by_rule(labels, pd.Series(1, index=labels.index))
    return {rule: int(cycles.is_step.sum()) for rule, cycles in found.items()}


TRAINING, VALIDATION = "data forward backward ", "data forward "


@pytest.mark.parametrize("batches", [1, 2, 4, 20])
def test_batches_of_a_validation_without_a_backward_pass_are_no_steps(batches: int) -> None:
    assert steps_of((TRAINING * 5 + VALIDATION * batches) * 6) == {"data": 30, "forward": 30}


def test_what_begins_a_validation_begins_no_step_however_long_it_takes() -> None:
    validation = "val_data val_data_wait val_forward " * 20
    assert steps_of((TRAINING * 5 + validation) * 6) == {"data": 30, "forward": 29}


def test_micro_batches_before_their_backward_passes_are_no_steps() -> None:
    assert steps_of(("data forward " * 4 + "backward " * 4) * 10) == {}
    assert steps_of((TRAINING + VALIDATION) * 20) == {}


def test_batches_that_lack_several_times_what_most_have_are_no_steps() -> None:
    training = "data forward gradients "
    assert steps_of((training * 15 + VALIDATION * 2) * 2) == {"data": 30, "forward": 30}
    assert steps_of(training * 30 + VALIDATION * 8) == {"data": 30, "forward": 30}
    assert steps_of((training * 5 + VALIDATION * 12) * 6) == {}  # which of the two trains?
    assert steps_of(VALIDATION * 2 + training * 30) == {"data": 31, "forward": 30}


def test_other_rules_count_only_if_they_give_as_many_steps() -> None:
    assert list(steps_of("data forward backward optimizer " * 20)) == ["optimizer", "data", "forward"]
    assert list(steps_of(("data forward backward " * 4 + "optimizer ") * 20)) == ["optimizer"]
    assert steps_of(*("data forward backward " * (2 + n % 3) + "optimizer" for n in range(20))) == {}


def test_where_a_long_name_was_cut_makes_no_other_kind_of_it() -> None:
    names = [f"step {n} {'x' * 300}"[:256] for n in (9, 10, 1000)]
    assert set(templates(names)) == {f"step {{n}} {'x' * 300}"[:200]}


def test_numbers_with_separators_are_left_out_of_phases() -> None:
    names = [f"forward of step {990 + n:,}" for n in range(20)]
    assert set(without_counters(names_of(*names))) == {"forward of step {n}"}
