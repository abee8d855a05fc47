"""Which layers each stage of a pipeline gets."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as some
from token_chain import VOCABULARY, WIDTH, TokenTraining

from hpcmm.config.schema import ClusterConfig, RunConfig
from hpcmm.train.recipes.stages import balanced, bounds_of, chain_of, costs_of


@given(some.lists(some.integers(0, 9), min_size=2, max_size=8), some.integers(1, 4))
def test_the_dearest_stage_is_as_cheap_as_can_be(costs: list[int], stages: int):
    stages = min(stages, len(costs))
    bounds = balanced(costs, stages)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(costs), stages + 1)
    assert all(start < stop for start, stop in itertools.pairwise(bounds))
    every = ([0, *inner, len(costs)] for inner in itertools.combinations(range(1, len(costs)), stages - 1))
    dearest = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(cuts)) for cuts in every)
    assert max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds)) == dearest


def test_equal_layers_are_shared_out_evenly():
    assert balanced([0, 1, 1, 1, 1, 0], 2) == [0, 3, 6]


def test_layers_that_the_user_counts_are_between_the_embedding_and_the_head():
    assert bounds_of([1, 3]) == [0, 2, 6]


def chain_costs(kind: str = "llama", **options: Any) -> list[float]:
    training = TokenTraining(RunConfig(cluster=ClusterConfig(name="test")), torch.device("cpu"), kind=kind, **options)
    structure = training.structure()
    return costs_of(chain_of(structure), structure, recomputed=False)


def test_a_stage_costs_what_its_weights_are_multiplied_with():
    embedding, *layers, head = chain_costs()
    assert len(set(layers)) == 1
    assert head == 3 * (WIDTH * VOCABULARY + WIDTH)
    assert 0 < embedding < layers[0]


def test_frozen_encoders_cost_their_forward_pass_alone():
    frozen = chain_costs(frozen="encoder connector trunk.lm.model.embed_tokens")
    assert 3 * frozen[0] == chain_costs()[0]


def test_a_token_pays_for_its_own_experts():
    two_of_four = chain_costs("mixtral")[1]
    four_of_four = chain_costs("mixtral", num_experts_per_tok=4)[1]
    assert four_of_four > 1.5 * two_of_four
