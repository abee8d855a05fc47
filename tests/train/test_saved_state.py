"""What a checkpoint holds besides DeepSpeed's files, and how damage to it is found."""

import random

import numpy as np
import pytest
import torch

from hpcmm.train.checkpoint import _damage_of_file, random_state, restore_random_state


def draws():
    return random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(3).tolist()  # noqa: S311


def test_every_generator_goes_on_where_it_was(tmp_path):
    draws()  # an odd number of NumPy's normal variates leaves the second of a pair for the next call
    torch.save(random_state(), tmp_path / "random.pt")
    expected = draws()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    restore_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draws() == expected


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "part.pt"
    torch.save({"weight": torch.arange(1000.0)}, path)
    return path


def test_a_file_that_was_not_touched_is_whole(saved):
    assert _damage_of_file(saved, saved.stat().st_size) is None


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_one_wrong_bit_among_the_numbers_is_found(saved, place):
    content = bytearray(saved.read_bytes())
    content[int(len(content) * place)] ^= 1
    saved.write_bytes(content)
    assert "checksum" in _damage_of_file(saved, len(content))


def test_a_file_that_was_cut_or_overwritten_is_found(saved):
    size = saved.stat().st_size
    saved.write_bytes(saved.read_bytes()[:-10])
    assert _damage_of_file(saved, size) == f"{size - 10} bytes instead of {size}"
    saved.write_bytes(bytes(size))
    assert "zip" in _damage_of_file(saved, size)
