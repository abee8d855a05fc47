"""Scores that several ranks work out together are those of one process, an uneven last batch included."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from real_ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

from hpcmm.config.schema import ClusterConfig
from hpcmm.train.sampling import even_share
from hpcmm.workloads.anomaly import training as anomaly_training
from hpcmm.workloads.anomaly.data_root import ensure_data
from hpcmm.workloads.anomaly.question_answering.conversations import ParsedAnswer
from hpcmm.workloads.anomaly.schema import AnomalyConfig, DataConfig, LlmConfig, LlmKind, ModelConfig
from hpcmm.workloads.anomaly.training import AnomalyTraining

RANKS = 3
PER_CATEGORY = 7
"""Of two categories: 14 images, so 5, 5 and 4 a rank, in batches of 4 and 1."""


@given(st.integers(1, 200), st.integers(1, 20))
def test_each_image_is_scored_once_and_each_rank_has_as_many(length: int, world_size: int):
    shares = [even_share(length, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    kept = [share[: len(range(rank, length, world_size))] for rank, share in enumerate(shares)]
    assert sorted(index for share in kept for index in share) == list(range(length))


def config(cache: Path) -> AnomalyConfig:
    run = AnomalyConfig(name="scores", cluster=ClusterConfig(name="here", cache_dir=str(cache)))
    run.data = DataConfig(
        generate=True,
        image_size=64,
        categories=["coins", "grass"],
        train_images_per_category=2,
        test_images_per_category=PER_CATEGORY,
    )
    run.model = ModelConfig(decoder_width=32, text_adapter_width=64, llm=LlmConfig(kind=LlmKind.tiny))
    return run


def make_talkative(training: AnomalyTraining) -> None:
    """Have an untrained model give each image another answer, and read a statement out of each."""
    assert training.model.language is not None
    with torch.no_grad():
        for parameter in training.model.language.llm.parameters():
            parameter.mul_(3)
    anomaly_training.parse_answer = read_a_statement


def read_a_statement(text: str) -> ParsedAnswer:
    number = zlib.crc32(text.encode())
    return ParsedAnswer(bool(number & 1), frozenset({number // 2 % 9}))


def scores_of_a_rank(rank: int, world_size: int, folder: str) -> None:
    training = AnomalyTraining(config(Path(folder) / "cache"), torch.device("cpu"))
    make_talkative(training)
    scores = training.evaluate(DistributedDataParallel(training.model), rank, world_size, final=True)
    Path(folder, f"{world_size}_{rank}.json").write_text(json.dumps(scores))


def test_the_ranks_scores_are_one_process_scores(tmp_path: Path, compiled_ops: None):
    ensure_data(config(tmp_path / "cache"))
    for world_size in (1, RANKS):
        run_ranks(world_size, scores_of_a_rank, world_size, str(tmp_path))
    alone, together, of_another = (
        json.loads((tmp_path / name).read_text()) for name in ("1_0.json", f"{RANKS}_0.json", f"{RANKS}_1.json")
    )
    assert set(alone) >= {"image_auroc", "pixel_auroc", "words_detection", "words_grid"}
    assert 0 < alone["words_detection_shuffled"] < 1  # the answers differ
    assert together == pytest.approx(alone, abs=1e-5)
    assert of_another == {}
