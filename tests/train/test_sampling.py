"""The order of the training examples over ranks, steps and epochs."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmm.config.schema import Schedule, TrainConfig
from hpcmm.train.engine import learning_rate_factor
from hpcmm.train.sampling import EndlessSampler


def rounds(count, length, size, world, seed=0, first=0):
    """For each of ``count`` rounds, the micro-batches of all ranks."""
    samplers = [EndlessSampler(length, size, rank, world, seed, first=first) for rank in range(world)]
    return list(zip(*(islice(iter(sampler), count) for sampler in samplers), strict=True))


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 6))
def test_each_epoch_sees_each_example_once_whatever_the_world_size(length, size, world):
    drawn = [number for batches in rounds(3 * length, length, size, world) for batch in batches for number in batch]
    for epoch in range(len(drawn) // length):
        part = drawn[epoch * length : (epoch + 1) * length]
        assert sorted(part) == list(range(epoch * length, (epoch + 1) * length))


def test_a_resumed_run_goes_on_where_the_first_ended():
    whole = rounds(12, length=10, size=3, world=2)
    assert rounds(7, length=10, size=3, world=2, first=5) == whole[5:]


def test_the_order_depends_on_seed_and_epoch():
    first, other = (rounds(20, length=20, size=1, world=1, seed=seed) for seed in (0, 1))
    assert first != other
    (two_epochs,) = [rounds(40, length=20, size=1, world=1)]
    epochs = [[number % 20 for (batch,) in part for number in batch] for part in (two_epochs[:20], two_epochs[20:])]
    assert epochs[0] != epochs[1]


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    factor = learning_rate_factor(TrainConfig(steps=110, warmup_steps=10))
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [factor(step) for step in (10, 60, 110)] == pytest.approx([1.0, 0.5, 0.0])
    constant = learning_rate_factor(TrainConfig(steps=110, warmup_steps=0, schedule=Schedule.constant))
    assert constant(0) == constant(100) == 1.0
