"""What names of NVTX ranges say, and which of their numbers count."""

import numpy as np
import pandas as pd
import pytest

from hpcmm.analysis.range_names import (
    counted,
    looks_like_a_step,
    matching,
    never_a_step,
    part_of_a_step,
    templates,
    without_counters,
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
        ("save_checkpoint", "checkpoint"),
        ("activation_checkpoint", ""),
        ("next_batch", "data"),
        ("data to device", ""),
        ("all_reduce", ""),
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
    ],
)
def test_the_number_that_goes_up_is_the_step_s(names: list[str], numbers: list[int] | None) -> None:
    found = counted(names)
    assert (found is None) if numbers is None else np.array_equal(found, numbers)


def test_an_expression_means_whole_names_before_parts_of_names() -> None:
    names = names_of("step", "optimizer_step", "step 2")
    assert matching(names, "step").tolist() == [True, False, False]
    assert matching(names, "step.*").tolist() == [True, False, True]
    assert matching(names, "mizer").tolist() == [False, True, False]
    assert not matching(names, "nosuch").any()
