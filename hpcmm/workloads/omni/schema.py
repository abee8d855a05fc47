"""Every key that the omni-modal workload adds to a run, with its type, default, bounds and meaning. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from hpcmm.config.keys import key


class OnError(StrEnum):
    """What becomes of a conversation that cannot be used."""

    refuse = "refuse"
    skip = "skip"


@dataclass
class OmniDataConfig:
    """Conversations in which text, images and sounds are mixed."""

    root: str | None = key(
        None,
        "Folder with ``train.jsonl``, ``test.jsonl`` and the files that they name. None: a data set that is made in "
        "``cluster.cache_dir``.",
    )
    generate: bool = key(
        True, "Make the data set if it is needed and not there. A folder that ``root`` names is never written to."
    )
    train_examples: int = key(2400, "Conversations to train on; of the data set that is made.", least=1)
    test_examples: int = key(720, "Conversations to be scored on; of the data set that is made.", least=1)
    text_words: float = key(
        8.0,
        "Median number of words that stand around a question, drawn from a lognormal distribution; of the data set "
        "that is made.",
        above=0,
    )
    text_spread: float = key(0.8, "Standard deviation of the logarithm of that number.", least=0, most=3)
    max_tokens: int = key(
        2048, "Most tokens of a conversation, images and sounds included; a longer one cannot be used.", least=2
    )
    packed: bool = key(
        True,
        "Put the conversations of a micro-batch one behind the other. False pads each to the longest of them, to "
        "measure what that costs.",
    )
    on_error: OnError = key(
        OnError.refuse,
        "A conversation with a file that cannot be read, or that is longer than ``max_tokens``: ``refuse`` ends the "
        "run, ``skip`` warns, takes the next one in training, and leaves it out of the scores.",
    )
    vocabulary: int = key(
        1024,
        "Most tokens of the tokenizer that is made from the training text, for a language model that has none.",
        least=300,
    )
    num_workers: int = key(0, "Loader processes a rank; 0 reads in the rank's own process.", least=0)
    prefetch_batches: int = key(2, "Micro-batches that each loader process makes ahead.", least=1)


def data_problems(data: OmniDataConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong between the keys of ``data``."""
    if data.root is None and not data.generate:
        yield "data.root is not given: name the folder of the data set, or have one made with data.generate=true."
