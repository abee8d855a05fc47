"""What the ranks of each recipe exchange in a step is what the literature counts, and no byte more."""

from __future__ import annotations

import functools

import pytest
from bytes_cases import RANKS, RECIPES, measure
from real_ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("compiled_ops")]

CORE = ("zero2 of three micro-batches", "zero3", "ulysses", "tensor", "3d", "expert")
"""One of each kind."""


@functools.cache
def measured(*names):
    """By rank, then by recipe."""
    return run_ranks(RANKS, measure, names, timeout_s=270)


def check(recipe, by_rank):
    for rank, of_recipes in enumerate(by_rank):
        exchanged, expected = of_recipes[recipe]
        assert exchanged == expected, f"on rank {rank}"


@pytest.mark.parametrize("recipe", CORE)
def test_a_step_exchanges_as_many_bytes_as_the_textbook_counts(recipe):
    check(recipe, measured(*CORE))


REST = tuple(name for name in RECIPES if name not in CORE)


@pytest.mark.long
@pytest.mark.parametrize("recipe", REST)
def test_so_does_each_other_form_of_a_recipe(recipe):
    check(recipe, measured(*REST))
